#!/bin/sh
# Makes what compose.yaml and kubernetes/README.md want in secrets/: a certificate authority, certificates, keys and passwords.
#
#   sh make_secrets.sh HOST [INSIDE]
#
# HOST is the name by which parties reach the broker, INSIDE the one that aggregators use where that is another one. What is there
# already stays: said again, it makes what is missing. broker-fl must be on the PATH, or BROKER_FL say how it is run.
set -eu

fail() {
    echo "$1" >&2
    exit 2
}

host=${1:-}
inside=${2:-$host}
[ -n "$host" ] || fail "usage: sh make_secrets.sh HOST [INSIDE]"
case "$host$inside" in
*[!A-Za-z0-9.-]*) fail "expected names of hosts, as broker.example.org, not '$host' and '$inside'" ;;
esac

cd "$(dirname "$0")"
# Containers get each file by itself, and read it as users of their own: the folder is what keeps others out.
umask 022
mkdir -p secrets enrolments
chmod 700 secrets enrolments

run() {
    # shellcheck disable=SC2086 # a command with its arguments
    ${BROKER_FL:-broker-fl} "$@"
}

# Bytes from the kernel, in hexadecimal.
random() {
    od -An -v -N"$1" -tx1 /dev/urandom | tr -d ' \n'
}

# A file that is whole or not there, from standard input.
keep() {
    cat >"secrets/.$1.part"
    [ -s "secrets/.$1.part" ] || fail "secrets/$1 could not be made"
    chmod "${2:-444}" "secrets/.$1.part"
    mv "secrets/.$1.part" "secrets/$1"
}

missing() {
    [ ! -e "secrets/$1" ]
}

certificate() {
    name=$1
    shift
    [ -e "secrets/authority/$name.pem" ] || run certs issue "$name" --folder secrets/authority "$@"
    keep "$name.pem" <"secrets/authority/$name.pem"
    keep "$name.key" <"secrets/authority/$name.key"
}

run certs init --folder secrets/authority
keep ca.pem <secrets/authority/ca.pem
set -- --host "$host"
[ "$inside" = "$host" ] || set -- "$@" --host "$inside"
certificate server --server "$@" --host rabbitmq --host localhost --host 127.0.0.1
certificate aggregator
certificate evaluator

for name in postgres_password grafana_password; do
    if missing "$name"; then random 24 | keep "$name"; fi
done
# People's and the aggregators' own; RabbitMQ gets them salted and hashed, in logins.json.
for name in operator.password supervisor.password; do
    if missing "$name"; then random 24 | keep "$name" 400; fi
done
if missing federation.key; then random 32 | keep federation.key; fi
if missing federation.pub; then run party key --set security.key=secrets/federation.key | keep federation.pub; fi
if missing logins.json; then
    run topology logins --broker "amqps://$host:5671/federation" \
        operator=secrets/operator.password supervisor=secrets/supervisor.password | keep logins.json
fi
if missing management_url; then echo "https://supervisor:$(cat secrets/supervisor.password)@$inside:15671" | keep management_url; fi
if missing ledger_url; then
    echo "postgresql+psycopg://broker_fl:$(cat secrets/postgres_password)@${LEDGER_HOST:-postgres}/broker_fl" | keep ledger_url
fi
# For people, who enrol from this folder: set -a; . secrets/operator.env; set +a
if missing operator.env; then
    keep operator.env 400 <<SETTINGS
BROKER_FL_BROKER__URL=amqps://$host:5671/federation
BROKER_FL_BROKER__CA=secrets/ca.pem
BROKER_FL_BROKER__MANAGEMENT_URL=https://operator:$(cat secrets/operator.password)@localhost:15671
BROKER_FL_SECURITY__KEY=secrets/federation.key
SETTINGS
fi
echo "secrets/ is complete; keep secrets/authority/ca-key.pem and secrets/federation.key safe, in a backup too"
