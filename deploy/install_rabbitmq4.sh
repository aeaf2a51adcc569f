#!/bin/sh
# Unpacks RabbitMQ 4.0, Debian 13's with its Erlang and its C library, into a folder of its own (build/rabbitmq4, or the first
# argument). The tests also run on it: make test-rabbitmq4. By hand:
#   BROKER_FL_RABBITMQ_SERVER=$PWD/build/rabbitmq4/bin/rabbitmq-server .venv/bin/broker-fl demo
#
# Needs Debian, of whatever release, with its mirror among apt's sources; neither root nor chroot. Nothing is installed and no
# service starts: what is unpacked runs by its own dynamic loader, finds its libraries beside it, and sees the files, sockets
# and processes of the machine as any other program does. Downloads 60 MB, takes 120 MB, and some seconds. What is there already
# is left as it is.
set -eu

release=trixie
folder=${1:-$(dirname "$0")/../build/rabbitmq4}
keyring=/usr/share/keyrings/debian-archive-keyring.gpg

if [ -x "$folder/bin/rabbitmq-server" ]; then exit 0; fi

fail() {
    cat >&2 <<MESSAGE
RabbitMQ 4 was not unpacked: $1.
  This script takes it from Debian's mirror. Elsewhere: https://www.rabbitmq.com/docs/download, then
  set BROKER_FL_RABBITMQ_SERVER to its rabbitmq-server
MESSAGE
    exit 1
}

for needed in apt-get dpkg-deb; do
    command -v "$needed" >/dev/null || fail "there is no $needed"
done
[ -r "$keyring" ] || fail "there is no $keyring, by which packages are verified"

mkdir -p "$(dirname "$folder")"
folder=$(cd "$(dirname "$folder")" && pwd)/$(basename "$folder")
if [ -e "$folder" ] && ! rmdir "$folder" 2>/dev/null; then fail "$folder holds something else"; fi
case $folder in
*' '*) fail "RabbitMQ's own scripts want no spaces in $folder" ;;
esac
made=$(mktemp -d "$folder.XXXXXX")
trap 'rm -rf "$made"' EXIT
trap 'exit 1' HUP INT TERM
chmod 755 "$made"
work=$made/work
mkdir -p "$work/lists/partial" "$work/archives/partial" "$made/root" "$made/bin"
: >"$work/status"

# An apt that knows nothing of what this machine has, and so fetches everything; only the settings of the machine (a proxy) count,
# but not what it does after an update.
cat >"$work/apt.conf" <<CONFIGURATION
Dir::Etc::SourceList "$work/sources.list";
Dir::Etc::SourceParts "/dev/null";
Dir::Etc::Preferences "/dev/null";
Dir::Etc::PreferencesParts "/dev/null";
Dir::State::Lists "$work/lists";
Dir::State::Status "$work/status";
Dir::State::extended_states "$work/extended_states";
Dir::Cache "$work";
Dir::Cache::Archives "$work/archives";
Acquire::Languages "none";
APT::Sandbox::User "";
APT::Get::Show-User-Simulation-Note "false";
#clear APT::Default-Release;
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
CONFIGURATION

# Whatever serves a release by Debian's name for it; others' packages do too, but not signed by Debian.
mirrors() {
    codename=$(sed -n 's/^VERSION_CODENAME=//p' /etc/os-release)
    apt-get --print-uris update |
        sed -n "s#^'\([^']*\)/dists/\(${codename:-sid}\|stable\|oldstable\|testing\|unstable\|sid\)/InRelease'.*#\1#p" | sort -u
}

fetch() {
    echo "deb [signed-by=$keyring] $1 $release main" >"$work/sources.list"
    apt-get -c "$work/apt.conf" -q -o APT::Update::Error-Mode=any update &&
        apt-get -c "$work/apt.conf" -q -y --no-install-recommends --download-only install rabbitmq-server
}

fetched=
for mirror in $(mirrors); do
    if fetch "$mirror" >"$work/apt.log" 2>&1; then
        fetched=yes
        break
    fi
    sed 's/^/  /' "$work/apt.log" >&2
done
[ -n "$fetched" ] || fail "apt's sources have no mirror that serves Debian's $release"

for package in "$work"/archives/rabbitmq-server_*.deb "$work"/archives/erlang-*.deb "$work"/archives/lib*.deb \
    "$work"/archives/zlib1g_*.deb; do
    dpkg-deb -x "$package" "$made/root"
done
rm -rf "$work"

# Each program of Erlang becomes a script that runs it with the C library from here.
loader=$(echo "$made"/root/usr/lib/*-linux-gnu*/ld-linux*.so.*)
[ -f "$loader" ] || fail "there is no dynamic loader in what was unpacked"
cat >"$made/run" <<'SCRIPT'
#!/bin/sh
self=$(readlink -f "$0")
here=${self%/*} name=${self##*/}
# The loader by the name of the program: so ps calls it.
libraries=$(readlink -f "$here/loader/$name")
exec "$here/loader/$name" --library-path "${libraries%/*}" --argv0 "$0" "$here/elf/$name" "$@"
SCRIPT
chmod 755 "$made/run"
find "$made/root/usr/lib/erlang" -type f -perm -u+x >"$made/programs"
while read -r program; do
    [ "$(head -c 4 "$program" | tail -c 3)" = ELF ] || continue
    here=${program%/*} name=${program##*/}
    mkdir -p "$here/elf" "$here/loader"
    mv "$program" "$here/elf/$name"
    ln -s -r "$loader" "$here/loader/$name"
    cp "$made/run" "$program"
done <"$made/programs"
rm "$made/run" "$made/programs"

# Erlang's own script of this name says where Debian would have installed it.
cat >"$made/root/usr/lib/erlang/bin/erl" <<'SCRIPT'
#!/bin/sh
self=$(readlink -f "$0")
ROOTDIR=${self%/bin/erl}
BINDIR=$(echo "$ROOTDIR"/erts-*/bin)
EMU=beam
PROGNAME=erl
export BINDIR ROOTDIR EMU PROGNAME
exec "$BINDIR/erlexec" "$@"
SCRIPT
ln -s -f -r "$made/root/usr/lib/erlang/bin/erl" "$made"/root/usr/lib/erlang/erts-*/bin/
cat >"$made/bin/server-script" <<'SCRIPT'
#!/bin/sh
# Runs RabbitMQ's script of this name with the Erlang from here.
here=$(cd "$(dirname "$0")" && pwd)
PATH=$here:$PATH
ESCRIPT_EMULATOR=$here/erl
export PATH ESCRIPT_EMULATOR
exec "$here/../root/usr/lib/rabbitmq/bin/$(basename "$0")" "$@"
SCRIPT
chmod 755 "$made/bin/server-script"
for name in epmd erl escript; do
    ln -s "../root/usr/lib/erlang/bin/$name" "$made/bin/$name"
done
for name in rabbitmq-server rabbitmqctl rabbitmq-diagnostics rabbitmq-plugins; do
    ln -s server-script "$made/bin/$name"
done

version=$(basename "$made"/root/usr/lib/rabbitmq/lib/rabbitmq_server-*)
version=${version#rabbitmq_server-}
case $version in
4.*) ;;
*) fail "the mirror has RabbitMQ $version" ;;
esac
"$made/bin/erl" -noinput -eval 'ok = crypto:start(), halt(0).' || fail "its Erlang does not run on this machine"
echo "$version" >"$made/version"
mv "$made" "$folder"
echo "Unpacked RabbitMQ $version into $folder"
