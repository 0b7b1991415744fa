#!/bin/sh
# A wheel on minimal Debians that have no compiler, no headers and no network, where pip finds only the wheel and those of
# numpy, tqdm and sentencepiece: it installs, doctor finds everything, and the demo runs from csv to submit.csv.
#
#     sh tests/portable/clean.sh WHEEL [bookworm/3.11 sid/3.14 ..]      as root, with debootstrap; Debians are kept in build/wheels-check
set -eu
wheel=$(realpath "$1")
shift
[ $# -gt 0 ] || set -- bookworm/3.11 sid/3.14
place=$(cd "$(dirname "$0")/../.." && pwd)/build/wheels-check
root=
trap 'rm -rf "$root"' EXIT
trap 'exit 1' INT TERM
mirror=$(cat /etc/apt/sources.list /etc/apt/sources.list.d/* 2>/dev/null |
    sed -n 's/^URIs: *\([^ ]*\).*/\1/p; s/^deb \(\[[^]]*\] \)\{0,1\}\([^ ]*\).*/\2/p' | grep '/debian/*$' | head -1)

for pair in "$@"; do
    suite=${pair%/*} version=${pair#*/}
    base=$place/$suite
    echo "---- Debian $suite, Python $version"
    if [ ! -e "$base/ready" ]; then
        rm -rf "$base"
        debootstrap --variant=minbase --include="python$version,python$version-venv" "$suite" "$base" \
            "${mirror:?no Debian mirror in the sources of apt}" | tail -1
        touch "$base/ready"
    fi
    root=$(mktemp -d)
    cp -a "$base/." "$root"
    for tool in gcc cc clang make; do
        [ -z "$(find "$root/usr/bin" -name "$tool" -o -name "$tool-[0-9]*")" ] || { echo "$suite has $tool" >&2; exit 1; }
    done
    [ -z "$(find "$root/usr/include" -name Python.h)" ] || { echo "$suite has Python's headers" >&2; exit 1; }
    python3 -m pip --disable-pip-version-check download -q --only-binary :all: --implementation cp --python-version "$version" \
        --platform manylinux2014_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux_2_28_x86_64 \
        -d "$root/wheels" "$wheel"
    ls "$root/wheels"
    unshare --net --mount --pid --fork --mount-proc="$root/proc" chroot "$root" env -i HOME=/root LANG=C.UTF-8 \
        PATH=/usr/sbin:/usr/bin:/sbin:/bin bash -eo pipefail -c "cd /root
            python$version -m venv v
            . v/bin/activate
            pip --disable-pip-version-check install -q --no-index --find-links /wheels glmlora
            glmlora doctor | tee doctor
            if grep 'NOT compiled' doctor; then exit 1; fi
            glmlora demo demo 2>told || { tail -5 told; exit 1; }
            test -s demo/xfg/submit.csv"
    rm -rf "$root"
done
