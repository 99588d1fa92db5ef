# Messages, and commands that never leave the reader in silence.
# shellcheck shell=bash disable=SC2154

say() {
    echo "images: $*" >&2
}

fail() {
    echo "images: error: $*" >&2
    exit 1
}

# run_quietly WHAT COMMAND...: runs it with its output kept aside; says every ten seconds that it is
# still at work, and shows the end of the output when it fails.
run_quietly() {
    local what=$1 log=$work/log start=$SECONDS pid status=0 next
    shift
    say "$what"
    "$@" >"$log" 2>&1 9>&- &
    pid=$!
    next=$((SECONDS + 10))
    while kill -0 "$pid" 2>/dev/null; do
        sleep 0.1
        if [ "$SECONDS" -ge "$next" ]; then
            say "$what: $((SECONDS - start)) s, $(tail -n 1 "$log" | tr '\r' '\n' | tail -n 1 | cut -c 1-80)"
            next=$((SECONDS + 10))
        fi
    done
    wait "$pid" || status=$?
    if [ "$status" != 0 ]; then
        tail -n 15 "$log" | sed 's/^/    /' >&2
        return "$status"
    fi
}
