#!/bin/sh
# Follows README.md word by word on a minimal Debian 12: what `make` says while its needs are missing, then every command of
# "Install" and "Try it", the ten lines, and `make test`.
#
#     sh tests/clean_machine.sh             as root, with debootstrap; 15 minutes. KEEP=DIR keeps the Debian for the next run
#
# The mirror and pip's index are those of this machine, read when it runs.
set -eu
here=$(cd "$(dirname "$0")/.." && pwd)
base=${KEEP:-$(mktemp -d)}/debian
root=$(mktemp -d)
cleanup() {
    mount | awk -v r="$root/" 'index($3, r) == 1 { print $3 }' | sort -r | while read -r m; do umount -l "$m"; done
    grep -q " $root/" /proc/mounts || rm -rf "$root"
    [ -n "${KEEP:-}" ] || rm -rf "${base%/debian}"
}
trap cleanup EXIT
trap 'exit 1' INT TERM
say() { printf '\n==== %s\n' "$*"; }

say "a minimal Debian 12"
mirror=$(cat /etc/apt/sources.list /etc/apt/sources.list.d/* 2>/dev/null |
    sed -n 's/^URIs: *\([^ ]*\).*/\1/p; s/^deb \(\[[^]]*\] \)\{0,1\}\([^ ]*\).*/\2/p' | grep '/debian/*$' | head -1)
[ -d "$base/usr" ] || debootstrap --variant=minbase bookworm "$base" "${mirror:?no Debian mirror in the sources of apt}" |
    tail -1
cp -a "$base/." "$root"
cp /etc/resolv.conf /etc/hosts "$root/etc/"
cp /etc/apt/apt.conf.d/*proxy* "$root/etc/apt/apt.conf.d/" 2>/dev/null || true
echo 'APT::Get::Assume-Yes "true"; APT::Install-Recommends "false"; Dpkg::Use-Pty "0";' >"$root/etc/apt/apt.conf.d/90yes"
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
mount --make-rslave "$root/dev"

# pip's settings, and the files and folders that they name
for file in $(python3 -m pip config debug 2>/dev/null | sed -n 's/^ *\(.*\), exists: True/\1/p'); do
    mkdir -p "$root$(dirname "$file")" && cp "$file" "$root$file"
done
for path in $(python3 -m pip config list 2>/dev/null | grep -o "/[^ ']*" | sed 's,^//*,/,; s,/simple$,,' | sort -u); do
    if [ -d "$path" ] && [ "$path" != / ]; then
        mkdir -p "$root$path" && mount --bind "$path" "$root$path"
    elif [ -f "$path" ]; then
        mkdir -p "$root$(dirname "$path")" && cp "$path" "$root$path"
    fi
done
settings=$(env | grep '^PIP_' | tr '\n' ' ')
cert=$(python3 -m pip config list | sed -n "s/.*\.cert='\(.*\)'/\1/p" | head -1)
if [ -f "$cert" ]; then # at a place that Debian's own certificates leave alone
    cp "$cert" "$root/root/certificates"
    settings="$settings PIP_CERT=/root/certificates"
fi

git clone -q "$here" "$root/root/glmlora"
inside() { # a command in the clone, as root, in an environment that is not this machine's
    # shellcheck disable=SC2086
    chroot "$root" env -i HOME=/root PATH=/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 DEBIAN_FRONTEND=noninteractive $settings \
        bash -ec "cd /root/glmlora; $1"
}
commands() { # the indented lines of a section of the README
    sed -n "/^## $1\$/,/^## /s/^    //p" "$here/README.md"
}
install=$(commands Install | grep '^apt-get install ')

say "make, while its needs are missing"
inside 'apt-get update -q; apt-get install -q make' >/dev/null
if told=$(inside 'make -s' 2>&1); then
    echo "make began without what it needs" >&2
    exit 1
fi
echo "$told"
for package in python3 python3-venv python3-dev gcc libc6-dev; do
    echo "$told" | grep -qE "apt-get install .*\b$package( |\$)" || { echo "$package is not named" >&2; exit 1; }
done
[ "$(echo "$told" | grep -c 'apt-get install')" = 1 ] && [ ! -e "$root/root/glmlora/.venv" ]

say "README.md: Install, Try it, ten lines"
commands Install && commands "Try it"
ten=$(sed -n '/^## Ten lines$/,/^## /p' "$here/README.md" | sed -n '/^```python$/,/^```$/{/^```$/q; /^```/!p}')
inside "set -x
$(commands Install)
$(commands "Try it")
cat >ten.py <<'TEN'
$ten
assert response == '1', response
TEN
python ten.py"
[ -s "$root/root/glmlora/demo/xfg/results.png" ] && [ -s "$root/root/glmlora/paper/submit.csv" ]

say "make, with nothing to do"
inside 'time make'

say "make test"
inside 'time make test'
say "README.md was followed: $install"
