# Layers and bases. build.sh sets $out, $work, $suite and $mirror.
# shellcheck shell=bash disable=SC2154

# Fixed times make equal inputs equal images.
export SOURCE_DATE_EPOCH=1704067200
created=2024-01-01T00:00:00Z

# Raise it when what this file makes of the same inputs changes.
layer_version=3

declare -A packages=(
    [python]="python3.11-minimal,libpython3.11-stdlib,busybox-static"
    [numpy]="python3.11-minimal,libpython3.11-stdlib,busybox-static,python3-numpy"
    [node]="nodejs,busybox-static"
)

digest() {
    sha256sum | cut -c 1-16
}

# pack DIRECTORY FILE [TAR-OPTION]...: an uncompressed layer, the same for the same files.
pack() {
    local directory=$1 file=$2
    shift 2
    tar --create --file "$file" --directory "$directory" --sort=name --numeric-owner \
        --owner=0 --group=0 --mtime="@$SOURCE_DATE_EPOCH" --format=posix \
        --pax-option=exthdr.name=%d/PaxHeaders/%f,delete=atime,delete=ctime "$@" .
}

# debian_tree NAME DIRECTORY: the packages' files, without package management. Only extracted: what
# maintainer scripts would do is done below, as far as these packages need it.
debian_tree() {
    local name=$1 tree=$2
    local sources=("deb $mirror $suite main" "deb $mirror $suite-updates main")
    case $mirror in
        *deb.debian.org*) sources+=("deb http://deb.debian.org/debian-security $suite-security main") ;;
    esac
    run_quietly "base $name: fetching Debian packages" \
        mmdebstrap --mode=root --variant=extract --include="${packages[$name]}" \
        --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
        --dpkgopt='path-exclude=/usr/share/locale/*' --dpkgopt='path-exclude=/usr/share/i18n/*' \
        --dpkgopt='path-exclude=/usr/lib/x86_64-linux-gnu/perl*' \
        --skip=check/empty "$suite" "$tree" "${sources[@]}" ||
        fail "could not fetch the packages of base $name from $mirror: see above; check the network, or give --mirror"
    finish_tree "$tree"
}

finish_tree() {
    local tree=$1 applet
    mkdir -p "$tree"/{dev,etc,home/app,proc,root,run,sys,tmp,var/tmp}
    chmod 1777 "$tree/tmp" "$tree/var/tmp"
    printf 'root:x:0:0:root:/root:/bin/sh\napp:x:1000:1000::/home/app:/bin/sh\nnobody:x:65534:65534::/nonexistent:/bin/false\n' >"$tree/etc/passwd"
    printf 'root:x:0:\napp:x:1000:\nnogroup:x:65534:\n' >"$tree/etc/group"
    printf 'hosts: files dns\n' >"$tree/etc/nsswitch.conf"
    rm -rf "$tree"/var/{cache,log,lib/apt,lib/dpkg} "$tree"/etc/{apt,resolv.conf,hostname}
    # A shell and the small tools that people expect of `exec`.
    local bin="$tree/bin"
    [ ! -d "$tree/usr/bin" ] || [ ! -L "$tree/bin" ] || bin="$tree/usr/bin"
    for applet in sh ash cat chmod cp date df du echo env find free grep head hostname id ip kill ls \
        mkdir mount mv netstat nslookup ping ps pwd rm sed sleep sort stat tail tar test top touch \
        tr true umount uname vi wc wget which xargs; do
        [ -e "$bin/$applet" ] || [ -e "$tree/usr/bin/$applet" ] ||
            ln -s "/bin/busybox" "$bin/$applet"
    done
    if [ -e "$tree/usr/bin/python3.11" ]; then
        [ -e "$tree/usr/bin/python3" ] || ln -s python3.11 "$tree/usr/bin/python3"
        rm -rf "$tree"/usr/lib/python3.11/{ensurepip,idlelib,lib2to3,pydoc_data,turtledemo}
        local library
        # What update-alternatives would link.
        for library in blas:libblas.so.3 lapack:liblapack.so.3; do
            local directory="usr/lib/x86_64-linux-gnu" part=${library%%:*} file=${library##*:}
            [ ! -e "$tree/$directory/$part/$file" ] || [ -e "$tree/$directory/$file" ] ||
                ln -s "$part/$file" "$tree/$directory/$file"
        done
        local modules=(/usr/lib/python3.11)
        [ ! -d "$tree/usr/lib/python3" ] || modules+=(/usr/lib/python3)
        run_quietly "compiling Python modules" chroot "$tree" /usr/bin/python3.11 -m compileall \
            -q --invalidation-mode unchecked-hash "${modules[@]}" ||
            fail "could not compile the Python modules of the base"
    fi
}

# base_layout NAME: makes the OCI layout of a base, unless it is there; sets $layout.
base_layout() {
    local name=$1 key
    key=$(echo "$layer_version $suite $mirror ${packages[$name]-}" | digest)
    layout=$out/base-$name-$key
    [ ! -d "$layout" ] || return 0
    local made=$work/base-$name
    case $name in
        numpy)
            # A layer of its own on top of python's: the files that python has not.
            base_layout python
            copy_layout "$layout" "$made"
            debian_tree numpy "$work/numpy"
            (cd "$work/numpy" && find . ! -type d | sort) >"$work/numpy.files"
            sort "$layout/files" >"$work/python.files"
            comm -23 "$work/numpy.files" "$work/python.files" >"$work/numpy.only"
            tar --create --file "$work/layer.tar" --directory "$work/numpy" --numeric-owner \
                --owner=0 --group=0 --mtime="@$SOURCE_DATE_EPOCH" --format=posix \
                --files-from "$work/numpy.only"
            cp "$work/numpy.files" "$made/files"
            layout=$out/base-$name-$key
            ;;
        go)
            new_layout "$made"
            ;;
        *)
            new_layout "$made"
            debian_tree "$name" "$work/$name"
            (cd "$work/$name" && find . ! -type d | sort) >"$made/files"
            pack "$work/$name" "$work/layer.tar"
            ;;
    esac
    if [ "$name" != go ]; then
        add_layer "$made" "$work/layer.tar" "Debian $suite: ${packages[$name]}"
    fi
    rm -rf --one-file-system "$out/base-$name-"* "${work:?}/$name"
    mv "$made" "$layout"
    say "base $name: done"
}

new_layout() {
    umoci init --layout "$1"
    umoci new --image "$1:latest"
}

# Blobs are never changed in place, so that copies may share them.
copy_layout() {
    mkdir "$2"
    cp -al "$1/blobs" "$2/blobs"
    cp "$1/index.json" "$1/oci-layout" "$2/"
}

add_layer() {
    run_quietly "adding layer: $3" umoci raw add-layer --image "$1:latest" \
        --history.created "$created" --history.created_by "$3" --history.author trenv "$2" ||
        fail "could not add a layer"
    rm -f "$2"
}
