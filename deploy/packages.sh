# Sourced by the scripts of this folder that install a server where it is missing. Such a script defines
#   present             succeeds where there is nothing to do
#   install_with_apt    is run as root
# and says: install_server NAME HOMEBREW_FORMULA "$@"
# shellcheck shell=sh

apt_install() {
    export DEBIAN_FRONTEND=noninteractive
    # A broken third-party source fails the update, although the package can still be installed.
    apt-get -o DPkg::Lock::Timeout=300 update || echo "apt-get update failed; trying to install all the same" >&2
    apt-get -o DPkg::Lock::Timeout=300 install -y --no-install-recommends "$@"
}

# The names are systemd's. Without it only the first is a service.
disable() {
    if command -v systemctl >/dev/null; then
        systemctl disable --now "$@" >/dev/null 2>&1
    elif command -v update-rc.d >/dev/null; then
        update-rc.d "${1%.service}" disable >/dev/null 2>&1
    fi
}

install_server() {
    if present; then return 0; fi
    if [ "${3:-}" = --as-root ] || { command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; }; then
        echo "Installing $1 with apt"
        install_with_apt
    elif command -v apt-get >/dev/null && command -v sudo >/dev/null; then
        if sudo -n true 2>/dev/null; then
            sudo -n sh "$0" --as-root
        elif [ -t 0 ] && [ -t 2 ]; then
            echo "$1 is not installed; sudo may ask for your password to install it with apt." >&2
            sudo sh "$0" --as-root
        fi
    elif command -v brew >/dev/null; then
        echo "Installing $1 with Homebrew"
        brew install "$2" </dev/null
    fi
}
