#!/bin/sh
# Installs the PostgreSQL server where it is missing. The tests start private servers from it.
#
# Exits 0 unless interrupted, and says on stderr what it could not do: the tests that need a real server are then skipped
# on a laptop and fail in CI.
#
# Leaves nothing running. Debian and Ubuntu make a first cluster ("main") with what they install, and start it, now and
# at every boot. A private server needs neither, so the cluster is not made and the service is disabled. Whoever wants a
# machine-wide one says `pg_createcluster 15 main`, with the version that came, and `systemctl enable --now postgresql`.
# Homebrew makes a first cluster too, and starts nothing by itself.
set -u

# shellcheck source=deploy/packages.sh
. "$(dirname "$0")/packages.sh"

present() {
    for folder in "${BROKER_FL_POSTGRESQL_BIN:-}" \
        /usr/lib/postgresql/*/bin \
        /opt/homebrew/opt/postgresql@*/bin \
        /usr/local/opt/postgresql@*/bin; do
        if [ -x "$folder/initdb" ] && [ -x "$folder/postgres" ]; then return 0; fi
    done
    command -v initdb >/dev/null && command -v postgres >/dev/null
}

defaults=/etc/postgresql-common/createcluster.d

# The maintainer script of the server's package asks this folder, once: when that version is installed for the first time.
# createcluster.conf itself is the package's and the administrator's. Ours goes again, for what they install later.
deny_first_cluster() {
    trap 'rm -f "$defaults/broker-fl.conf"; rmdir "$defaults" "${defaults%/*}" 2>/dev/null' EXIT
    trap 'exit 1' HUP INT TERM
    mkdir -p "$defaults"
    cat >"$defaults/broker-fl.conf" <<'SETTINGS'
# Written by broker-fl's deploy/install_postgresql.sh while it installs PostgreSQL; if it is still here, remove it.
create_main_cluster = false
SETTINGS
}

install_with_apt() {
    deny_first_cluster
    apt_install postgresql
    if present; then disable postgresql.service; fi
}

install_server PostgreSQL postgresql@17 "$@"
if present || [ "${1:-}" = --as-root ]; then exit 0; fi

cat >&2 <<'MESSAGE'
WARNING: PostgreSQL is not installed, and could not be installed without your help.
  Tests that need a real server are skipped (and fail in CI).
  Debian, Ubuntu:  sudo sh deploy/install_postgresql.sh
  macOS:           brew install postgresql@17
  others:          https://www.postgresql.org/download, then set BROKER_FL_POSTGRESQL_BIN to the folder of its initdb
MESSAGE
exit 0
