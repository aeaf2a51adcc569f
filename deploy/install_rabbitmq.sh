#!/bin/sh
# Installs the RabbitMQ server where it is missing. The demo and the tests start private nodes from it.
#
# Exits 0 unless interrupted, and says on stderr what it could not do: without RabbitMQ the demo takes the in-memory
# broker, and the tests that need a real one are skipped on a laptop and fail in CI.
#
# Leaves nothing running. Debian and Ubuntu start what they install, now and at every boot, and both RabbitMQ (port
# 5672) and Erlang's port mapper (epmd, port 4369) then listen on every network interface. A private node needs neither
# service, so their start is denied during the installation and disabled after it. Whoever wants the machine-wide broker
# says `systemctl enable --now rabbitmq-server`. Homebrew starts nothing by itself.
set -u

present() {
    for server in "${BROKER_FL_RABBITMQ_SERVER:-}" \
        /usr/lib/rabbitmq/bin/rabbitmq-server \
        /opt/homebrew/opt/rabbitmq/sbin/rabbitmq-server \
        /usr/local/opt/rabbitmq/sbin/rabbitmq-server; do
        if [ -f "$server" ] && [ -x "$server" ]; then return 0; fi
    done
    command -v rabbitmq-server >/dev/null
}

policy=/usr/sbin/policy-rc.d

# Maintainer scripts ask this file before they start a service. An existing one is the administrator's and stays in
# force. Ours names its two services: even where it is left behind (a power cut) every other service starts as before.
deny_start() {
    [ ! -e "$policy" ] && [ ! -L "$policy" ] || return 0
    trap 'rm -f "$policy"' EXIT
    trap 'exit 1' HUP INT TERM
    cat >"$policy" <<'POLICY'
#!/bin/sh
# Written by broker-fl's deploy/install_rabbitmq.sh while it installs RabbitMQ; if it is still here, remove it.
case " $* " in
*" rabbitmq-server "* | *" rabbitmq-server.service "* | *" epmd.service "* | *" epmd.socket "*) exit 101 ;;
esac
exit 104
POLICY
    chmod 755 "$policy"
}

disable() {
    if command -v systemctl >/dev/null; then
        systemctl disable --now "$@" >/dev/null 2>&1
    elif command -v update-rc.d >/dev/null; then
        update-rc.d rabbitmq-server disable >/dev/null 2>&1
    fi
}

install_with_apt() {
    export DEBIAN_FRONTEND=noninteractive
    services=rabbitmq-server.service
    # Where Erlang was installed before, its port mapper may be in use.
    command -v epmd >/dev/null || services="$services epmd.service epmd.socket"
    deny_start
    # A broken third-party source fails the update, although RabbitMQ can still be installed.
    apt-get -o DPkg::Lock::Timeout=300 update || echo "apt-get update failed; trying to install all the same" >&2
    apt-get -o DPkg::Lock::Timeout=300 install -y --no-install-recommends rabbitmq-server
    # shellcheck disable=SC2086 # a list of words
    if present; then disable $services; fi
}

if present; then exit 0; fi

if [ "${1:-}" = --as-root ] || { command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; }; then
    echo "Installing RabbitMQ with apt"
    install_with_apt
    [ "${1:-}" != --as-root ] || exit 0
elif command -v apt-get >/dev/null && command -v sudo >/dev/null; then
    if sudo -n true 2>/dev/null; then
        sudo -n sh "$0" --as-root
    elif [ -t 0 ] && [ -t 2 ]; then
        echo "RabbitMQ is not installed; sudo may ask for your password to install it with apt." >&2
        sudo sh "$0" --as-root
    fi
elif command -v brew >/dev/null; then
    echo "Installing RabbitMQ with Homebrew"
    brew install rabbitmq </dev/null
fi

if present; then exit 0; fi

cat >&2 <<'MESSAGE'
WARNING: RabbitMQ is not installed, and could not be installed without your help.
  The demo takes the in-memory broker; tests that need a real one are skipped (and fail in CI).
  Debian, Ubuntu:  sudo sh deploy/install_rabbitmq.sh
  macOS:           brew install rabbitmq
  others:          https://www.rabbitmq.com/docs/download, then set BROKER_FL_RABBITMQ_SERVER to its rabbitmq-server
MESSAGE
exit 0
