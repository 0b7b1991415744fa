#!/bin/sh
# A CPython 3.13 without a GIL in build/python3.13t, where `make wheels` finds it: from Debian's source of it, in six minutes.
#
#     sh tests/portable/free_threaded.sh       with gcc, make, libssl-dev, zlib1g-dev, libffi-dev
set -eu
place=$(cd "$(dirname "$0")/../.." && pwd)/build
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 1' INT TERM
mirror=$(cat /etc/apt/sources.list /etc/apt/sources.list.d/* 2>/dev/null |
    sed -n 's/^URIs: *\([^ ]*\).*/\1/p; s/^deb \(\[[^]]*\] \)\{0,1\}\([^ ]*\).*/\2/p' | grep '/debian/*$' | head -1)

# apt's own state is left alone
mkdir -p "$work/lists/partial" "$work/archives/partial"
echo "deb-src [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] ${mirror:?no Debian mirror in the sources of apt} trixie main" \
    >"$work/sources.list"
cat >"$work/apt.conf" <<CONF
Dir::Etc::SourceList "$work/sources.list";
Dir::Etc::SourceParts "/dev/null";
Dir::State::lists "$work/lists";
Dir::Cache "$work";
APT::Sandbox::User "root";
CONF
export APT_CONFIG="$work/apt.conf"
cd "$work"
apt-get -qq update
apt-get -qq source --download-only python3.13
mkdir source
tar -xJf python3.13_*.orig.tar.xz -C source --strip-components 1
cd source
./configure -q --disable-gil --prefix="$place/python3.13t" >/dev/null
make -s -j2 >"$work/log" 2>&1 || { tail -20 "$work/log"; exit 1; }
make -s install >"$work/log" 2>&1 || { tail -20 "$work/log"; exit 1; }
"$place/python3.13t/bin/python3.13t" -c 'import ssl, zlib, ctypes, sys; print(sys.executable, sys.version)'
