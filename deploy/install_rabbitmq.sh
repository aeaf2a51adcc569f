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

# shellcheck source=deploy/packages.sh
. "$(dirname "$0")/packages.sh"

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

install_with_apt() {
    services=rabbitmq-server.service
    # Where Erlang was installed before, its port mapper may be in use.
    command -v epmd >/dev/null || services="$services epmd.service epmd.socket"
    deny_start
    apt_install rabbitmq-server
    # shellcheck disable=SC2086 # a list of words
    if present; then disable $services; fi
}

install_server RabbitMQ rabbitmq "$@"
if present || [ "${1:-}" = --as-root ]; then exit 0; fi

cat >&2 <<'MESSAGE'
WARNING: RabbitMQ is not installed, and could not be installed without your help.
  The demo takes the in-memory broker; tests that need a real one are skipped (and fail in CI).
  Debian, Ubuntu:  sudo sh deploy/install_rabbitmq.sh
  macOS:           brew install rabbitmq
  others:          https://www.rabbitmq.com/docs/download, then set BROKER_FL_RABBITMQ_SERVER to its rabbitmq-server
MESSAGE
exit 0
