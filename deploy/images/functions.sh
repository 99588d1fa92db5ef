# The functions: what each image is made of. build.sh sets $root, $out and $work.
# shellcheck shell=bash disable=SC2154

all_functions=(hello-python hello-node json-python image-node numpy-python go-server plain-python plain-node
    base-python base-node)

node_module_directory=/usr/lib/node_modules/trenv-generation

known() {
    local name
    for name in "${all_functions[@]}"; do
        [ "$name" != "$1" ] || return 0
    done
    return 1
}

image_name() {
    echo "docker.io/trenv/$1:latest"
}

base_of() {
    case $1 in
        numpy-python) echo numpy ;;
        *-python) echo python ;;
        *-node) echo node ;;
        go-server) echo go ;;
    esac
}

# A base is what its language's functions have in common; functions start from its snapshot.
is_base() {
    [[ $1 == base-* ]]
}

# Which functions stand behind the watchdog; the others listen on port 8080 themselves.
has_watchdog() {
    case $1 in
        plain-* | go-server) return 1 ;;
    esac
}

find_fwatchdog() {
    local file
    if [ -z "$fwatchdog" ]; then
        for file in "$root"/target/x86_64-unknown-linux-gnu/{release,debug}/fwatchdog; do
            [ -x "$file" ] || continue
            [ -n "$fwatchdog" ] && [ "$fwatchdog" -nt "$file" ] || fwatchdog=$file
        done
    fi
    [ -n "$fwatchdog" ] ||
        fail "no watchdog built; run: cargo build --release -p trenv-watchdog, or give --fwatchdog"
    [ -x "$fwatchdog" ] || fail "the watchdog $fwatchdog is not there or not executable"
}

# function_tree NAME DIRECTORY: the function's own files.
function_tree() {
    local name=$1 tree=$2 app=$2/home/app base
    base=$(base_of "$name")
    mkdir -p "$app"
    case $base in
        go)
            run_quietly "$name: compiling" env -C "$root/functions/$name" CGO_ENABLED=0 GOOS=linux \
                GOCACHE="$out/.go-cache" GOFLAGS=-trimpath GOPROXY=off \
                go build -buildvcs=false -ldflags='-s -w' -o "$tree/server" . ||
                fail "could not compile $name"
            rmdir "$app" "$tree/home"
            mkdir -p "$tree"/{dev,etc,proc,run,sys,tmp}
            chmod 1777 "$tree/tmp"
            return
            ;;
        python | numpy)
            cp "$root/functions/$name"/*.py "$app/"
            has_watchdog "$name" || python_module "$tree"
            ;;
        node)
            cp "$root/functions/$name"/*.js "$app/"
            has_watchdog "$name" || node_module "$tree"
            ;;
    esac
    chmod -R u=rwX,go=rX "$tree"
}

# runtime_tree NAME DIRECTORY: what stands between the watchdog and the handlers of a language.
runtime_tree() {
    local tree=$2 app=$2/home/app
    mkdir -p "$app"
    case $(base_of "$1") in
        python | numpy)
            cp "$root/functions/runtime/python/serve.py" "$app/"
            python_module "$tree"
            ;;
        node)
            cp "$root/functions/runtime/node/serve.js" "$app/"
            node_module "$tree"
            ;;
    esac
    chmod -R u=rwX,go=rX "$tree"
}

# The modules that draw random state anew in each instance; see functions/modules.
python_module() {
    local site=$1/usr/lib/python3/dist-packages
    mkdir -p "$site"
    cp "$root"/functions/modules/python/trenv_generation.{py,pth} "$site/"
}

node_module() {
    local source=$root/functions/modules/node module=$1$node_module_directory
    mkdir -p "$module"
    cp "$source"/{index.js,package.json} "$module/"
    cc -O2 -s -shared -fPIC -fvisibility=hidden -Wl,--build-id=none \
        -o "$module/page.node" "$source/page.c" || fail "could not compile $source/page.c"
}

# function_command NAME: the image's command and environment, as options of umoci config.
function_command() {
    local path=PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
    options=(--config.env "$path" --config.exposedports 8080/tcp)
    local process
    case $1 in
        plain-python) options+=(--config.cmd python3 --config.cmd server.py) ;;
        plain-node) options+=(--config.cmd node --config.cmd server.js) ;;
        go-server) options+=(--config.cmd /server) ;;
        *-python) process="python3 serve.py handler" ;;
        *-node) process="node serve.js handler.js" ;;
    esac
    if has_watchdog "$1"; then
        options+=(--config.cmd fwatchdog --config.env mode=http --config.env "fprocess=$process"
            --config.env upstream_url=http://127.0.0.1:5000)
    fi
    if [ "$1" != go-server ]; then
        options+=(--config.workingdir /home/app --config.env HOME=/home/app)
    fi
    case $1 in
        *-python) options+=(--config.env PYTHONUNBUFFERED=1) ;;
        *-node) options+=(--config.env "NODE_OPTIONS=--require $node_module_directory") ;;
    esac
}

build_function() {
    local name=$1 layout tree=$work/tree image key options watchdog=
    local file=$out/$name.tar sources=()
    is_base "$name" || sources+=("$root/functions/$name")
    base_layout "$(base_of "$name")"
    function_command "$name"
    case $name in
        *-python) sources+=("$root/functions/modules/python") ;;
        *-node) sources+=("$root/functions/modules/node") ;;
    esac
    if has_watchdog "$name"; then
        sources+=("$root/functions/runtime")
        watchdog=$(watchdog_digest)
    fi
    key=$({
        echo "$layer_version $(basename "$layout") ${options[*]} $watchdog"
        find "${sources[@]}" -type f ! -name '*.pyc' -print0 | sort -z | xargs -0 sha256sum | sed "s,$root,,"
    } | digest)
    if [ -e "$file" ] && [ "$(cat "$file.key" 2>/dev/null)" = "$key" ]; then
        return
    fi
    image=$work/image
    rm -rf "$image" "$tree"
    copy_layout "$layout" "$image"
    if [ -n "$watchdog" ]; then
        mkdir -p "$work/watchdog/usr/bin"
        strip_watchdog "$work/watchdog/usr/bin/fwatchdog"
        pack "$work/watchdog" "$work/layer.tar"
        add_layer "$image" "$work/layer.tar" "trenv: fwatchdog"
        runtime_tree "$name" "$tree"
        pack "$tree" "$work/layer.tar"
        add_layer "$image" "$work/layer.tar" "trenv: runtime"
        rm -rf "$tree"
    fi
    if ! is_base "$name"; then
        function_tree "$name" "$tree"
        pack "$tree" "$work/layer.tar"
        add_layer "$image" "$work/layer.tar" "trenv: function $name"
    fi
    umoci config --image "$image:latest" --created "$created" --author trenv \
        --history.created "$created" --history.created_by "trenv: configuration of $name" \
        --config.label "org.opencontainers.image.title=$name" "${options[@]}"
    umoci gc --layout "$image" >/dev/null 2>&1
    # containerd gives an imported image the name in this annotation.
    jq --arg name "$(image_name "$name")" \
        '.manifests[0].annotations["io.containerd.image.name"] = $name' \
        "$image/index.json" >"$image/index.new"
    mv "$image/index.new" "$image/index.json"
    rm -f "$file.key"
    tar --create --file "$work/$name.tar" --directory "$image" --sort=name --numeric-owner \
        --owner=0 --group=0 --mtime="@$SOURCE_DATE_EPOCH" oci-layout index.json blobs
    mv "$work/$name.tar" "$file"
    echo "$key" >"$file.key"
    built=$((built + 1))
    say "$name: $(du -h "$file" | cut -f 1) in $file"
}

# Symbols are for debugging on the host, not for the image.
strip_watchdog() {
    install -D -m 755 "$fwatchdog" "$1"
    ! command -v strip >/dev/null || strip --strip-all "$1" || fail "could not strip the watchdog"
}

# The digest of the stripped binary: a build that differs only in symbols changes no image.
watchdog_digest() {
    if [ -z "${watchdog_sum:-}" ]; then
        strip_watchdog "$work/fwatchdog"
        watchdog_sum=$(digest <"$work/fwatchdog")
    fi
    echo "$watchdog_sum"
}
