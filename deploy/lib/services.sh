# shellcheck shell=bash
# containerd and the provider, with systemd or without.
# Uses: config, state, run, bin, libexec, programs, dax_programs, here.
# shellcheck disable=SC2154

readonly own_containerd=$state/containerd
readonly own_socket=$run/containerd/containerd.sock
readonly system_socket=/run/containerd/containerd.sock
readonly unit=/etc/systemd/system/trenv-provider.service

# setting SECTION KEY DEFAULT: a text value of the configuration.
setting() {
    local value
    value=$(sed -n "/^\\[$1\\]/,/^\\[/s/^$2 *= *\"\\(.*\\)\"/\\1/p" "$config" | head -n 1)
    echo "${value:-$3}"
}

has_systemd() {
    [ -d /run/systemd/system ]
}

# answers SOCKET: ctr alone would wait 10 s for a socket that is not there.
answers() {
    [ -S "$1" ] && ctr -a "$1" version >/dev/null 2>&1
}

# The socket of the containerd that the configuration names, else of the one in use.
containerd_address() {
    local configured=
    if [ -e "$config" ]; then
        configured=$(setting containerd address "")
    fi
    if [ -n "$configured" ]; then
        echo "$configured"
    elif answers "$system_socket"; then
        echo "$system_socket"
    else
        echo "$own_socket"
    fi
}

start_containerd() {
    local address
    if has_systemd && ! answers "$system_socket"; then
        systemctl start containerd || note "systemd cannot start containerd; an own one is started"
    fi
    address=$(containerd_address)
    if answers "$address"; then
        note "containerd answers at $address"
        return
    fi
    [ "$address" = "$own_socket" ] || fail "$config names containerd at $address, but nothing answers there; start it, or correct the file."
    mkdir -p "$own_containerd/root" "$run/containerd"
    # The CRI plugin is left out: it would want addresses and ports of its own.
    cat >"$own_containerd/config.toml" <<CONFIG
version = 2
root = "$own_containerd/root"
state = "$run/containerd/state"
disabled_plugins = ["io.containerd.grpc.v1.cri"]
[grpc]
  address = "$own_socket"
CONFIG
    TRENV_CONFIG=$config background containerd containerd --config "$own_containerd/config.toml"
    wait_for "containerd at $own_socket" answers "$own_socket"
    note "an own containerd answers at $own_socket"
}

provider_log() {
    if has_systemd; then
        echo "journalctl -u trenv-provider"
    else
        echo "$state/log/provider.log"
    fi
}

provider_answers() {
    curl -fsS -o /dev/null --max-time 2 "http://$(provider_listen)/healthz" 2>/dev/null
}

provider_listen() {
    setting provider listen 127.0.0.1:8080
}

start_provider() {
    if has_systemd; then
        cat >"$unit" <<UNIT
[Unit]
Description=trenv: functions over HTTP
Documentation=file://$here/docs/user-guide.md
After=network.target containerd.service

[Service]
ExecStart=$bin/trenv-provider
Restart=on-failure
RestartSec=1
# Sandboxes belong to containerd's shim and live on when the provider restarts.
KillMode=process

[Install]
WantedBy=multi-user.target
UNIT
        systemctl daemon-reload
        systemctl enable -q trenv-provider
        systemctl restart trenv-provider
    else
        stop_background provider
        background provider "$bin/trenv-provider"
    fi
    wait_for "the provider at $(provider_listen); see $(provider_log)" provider_answers
    note "the provider answers at http://$(provider_listen)"
}

# background NAME COMMAND...: a daemon with a pid file and a log, for machines without systemd.
background() {
    local name=$1
    shift
    mkdir -p "$state/log" "$run"
    setsid "$@" >>"$state/log/$name.log" 2>&1 </dev/null &
    echo $! >"$run/$name.pid"
}

# stop_background NAME: ends it if the pid file still names it.
stop_background() {
    local file=$run/$1.pid pid tries
    [ -s "$file" ] || return 0
    pid=$(cat "$file")
    if [ -e "/proc/$pid" ] && tr '\0' ' ' <"/proc/$pid/cmdline" | grep -q "$1"; then
        kill "$pid" 2>/dev/null || true
        for tries in $(seq 100); do
            [ -e "/proc/$pid" ] || break
            [ "$tries" -lt 90 ] || kill -9 "$pid" 2>/dev/null || true
            sleep 0.1
        done
    fi
    rm -f "$file"
}

wait_for() {
    local what=$1 tries
    shift
    for tries in $(seq 150); do
        if "$@"; then
            return
        fi
        sleep 0.2
    done
    fail "No answer from $what after $((tries / 5)) s"
}

# Every containerd namespace in which the provider has put sandboxes.
our_namespaces() {
    local file
    for file in "$run"/shim/*.address; do
        [ -e "$file" ] && basename "$file" .address
    done
    return 0
}

# Ends the sandboxes, the provider and, if it is ours, containerd.
stop_services() {
    if has_systemd && [ -e "$unit" ]; then
        systemctl disable -q --now trenv-provider || true
        rm -f "$unit"
        systemctl daemon-reload
    fi
    stop_background provider
    if command -v ctr >/dev/null && answers "$(containerd_address)"; then
        local namespace
        for namespace in $(our_namespaces); do
            remove_sandboxes "$namespace"
        done
    fi
    stop_background containerd
}

# remove_sandboxes NAMESPACE: containers that run with our shim, with snapshots, leases and images of ours.
remove_sandboxes() {
    local ctr=(ctr -a "$(containerd_address)" -n "$1") id
    for id in $("${ctr[@]}" container ls 2>/dev/null | awk '$NF == "io.containerd.trenv.v2" { print $1 }'); do
        "${ctr[@]}" task kill -s SIGKILL "$id" >/dev/null 2>&1 || true
        "${ctr[@]}" task delete -f "$id" >/dev/null 2>&1 || true
        "${ctr[@]}" container delete "$id" >/dev/null 2>&1 || true
    done
    for id in $("${ctr[@]}" leases ls -q 2>/dev/null | grep '^trenv' || true); do
        "${ctr[@]}" leases rm "$id" >/dev/null 2>&1 || true
    done
}

remove_everything() {
    local name bridge=trenv0 parent=trenv table=trenv
    if [ -e "$config" ]; then
        bridge=$(setting network bridge "$bridge")
        parent=$(setting sandbox cgroup_parent "$parent")
    fi
    [ "$bridge" = trenv0 ] || table=trenv_${bridge//-/_}
    if command -v nft >/dev/null; then
        nft delete table ip "$table" 2>/dev/null || true
    fi
    if [ -e "/sys/class/net/$bridge" ]; then
        ip link delete "$bridge" || true
    fi
    # Empty by now: a cgroup with processes in it cannot be removed, and stays.
    for name in /sys/fs/cgroup/"$parent" /sys/fs/cgroup/*/"$parent"; do
        [ ! -d "$name" ] || find "$name" -depth -type d -exec rmdir {} + 2>/dev/null || true
    done
    # What is still mounted below our directories goes before the directories do.
    awk -v run="$run/" -v state="$state/" \
        'index($5, run) == 1 || index($5, state) == 1 { print $5 }' /proc/self/mountinfo |
        sort -r | while read -r name; do
        umount -l "$name" || true
    done
    for name in "${programs[@]}" "${dax_programs[@]}"; do
        rm -f "$bin/$name"
    done
    rm -rf "$libexec" /etc/trenv
    for name in "$state" "$run"; do
        if mountpoint -q "$name"; then
            find "$name" -mindepth 1 -maxdepth 1 ! -name lost+found -exec rm -rf {} +
            note "$name is empty and stays, since a file system is mounted there"
        else
            rm -rf "$name"
        fi
    done
}
