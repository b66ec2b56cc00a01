#!/bin/sh
# Builds heddle's image from scratch with buildah, as root and without a daemon; or the sample application's.
#
#   deploy/image/build.sh [--binaries DIR] [--tag NAME] [--output FILE] [--dynamic] [heddle|sample]
#
# --binaries DIR  take the binaries from there instead of building them for release
# --tag NAME      name of the image [heddle:<version>]
# --output FILE   where the OCI archive goes [target/image/<name>.tar]
# --dynamic       take binaries that need a C library: the image can be looked at, not run
set -eu

here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
version=$(sed -n 's/^version = "\(.*\)"/\1/p' "$root/Cargo.toml" | head -n 1)
what=heddle binaries='' tag='' output='' dynamic=''
fail() {
    echo "build.sh: $1" >&2
    exit 1
}
while [ $# -gt 0 ]; do
    case $1 in
    --binaries | --tag | --output)
        [ $# -ge 2 ] || fail "$1 needs a value"
        case $1 in
        --binaries) binaries=$2 ;;
        --tag) tag=$2 ;;
        --output) output=$2 ;;
        esac
        shift
        ;;
    --dynamic) dynamic=yes ;;
    heddle | sample) what=$1 ;;
    *) fail "unknown argument $1" ;;
    esac
    shift
done
command -v buildah >/dev/null || fail 'buildah is not installed (Debian package buildah)'
[ "$(id -u)" = 0 ] || fail 'run it as root: without a user namespace buildah needs that'
case $what in
heddle) name=heddle ;;
sample) name=heddle-sample ;;
esac
: "${tag:=$name:$version}" "${output:=$root/target/image/$name.tar}"
work=$(mktemp -d)
container=''
# An own store, so that nothing is left in the machine's.
buildah() {
    command buildah --root "$work/store" --runroot "$work/run" --storage-driver vfs "$@"
}
clean() {
    [ -z "$container" ] || buildah rm "$container" >/dev/null 2>&1 || :
    rm -rf "$work"
}
trap clean EXIT
trap 'exit 130' INT TERM

# Whether a program can run without a C library and its loader.
static() {
    ! LC_ALL=C readelf -l "$1" | grep -q 'INTERP'
}

mkdir -p "$work/root"
case $what in
heddle)
    programs='heddle heddle-cni'
    if [ -z "$binaries" ]; then
        # Only the last step is linked statically: crates are compiled the same either way.
        for program in $programs; do
            cargo rustc --manifest-path "$root/Cargo.toml" --release --locked --package heddle --bin "$program" -- \
                -C target-feature=+crt-static
        done
        binaries=$root/target/release
    fi
    for program in $programs; do
        [ -x "$binaries/$program" ] || fail "$binaries/$program is not there"
        strip -o "$work/root/$program" "$binaries/$program"
        [ -n "$dynamic" ] || static "$work/root/$program" || fail "$binaries/$program needs a C library: build it with -C target-feature=+crt-static"
    done
    ;;
sample)
    busybox=$(command -v busybox) || fail 'busybox is not installed (Debian package busybox-static)'
    static "$busybox" || fail "$busybox needs a C library (Debian package busybox-static)"
    mkdir -p "$work/root/bin" "$work/root/srv"
    cp "$busybox" "$work/root/bin/busybox"
    for applet in sh nc wget timeout sleep date hostname; do
        ln -s busybox "$work/root/bin/$applet"
    done
    cp "$root"/deploy/sample/srv/* "$work/root/srv/"
    ;;
esac

container=$(buildah from scratch)
buildah copy --quiet "$container" "$work/root" / >/dev/null
case $what in
heddle) buildah config --entrypoint '["/heddle"]' "$container" ;;
sample) buildah config --entrypoint '[]' --env PATH=/bin --user 65532 "$container" ;;
esac
buildah config --label org.opencontainers.image.title="$name" --label org.opencontainers.image.version="$version" \
    --label org.opencontainers.image.licenses=Apache-2.0 "$container"
buildah commit --quiet --format oci "$container" "$tag" >/dev/null
mkdir -p "$(dirname "$output")"
rm -f "$output"
buildah push --quiet "$tag" "oci-archive:$output:$tag"
echo "$tag: $(stat -c %s "$output") bytes compressed, in $output"
