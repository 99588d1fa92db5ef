# shellcheck shell=bash
# Progress in lines, each with the time since the start.

steps_started=$SECONDS
steps_count=0

elapsed() {
    local seconds=$((SECONDS - steps_started))
    printf '%d:%02d' $((seconds / 60)) $((seconds % 60))
}

# step TITLE COMMAND...: says what is done, does it, says how long it took.
step() {
    local title=$1 begin=$SECONDS
    shift
    steps_count=$((steps_count + 1))
    printf '[%s] %d. %s\n' "$(elapsed)" "$steps_count" "$title"
    "$@"
    printf '[%s] %d. done in %d s\n' "$(elapsed)" "$steps_count" $((SECONDS - begin))
}

note() {
    printf '        %s\n' "$*"
}

fail() {
    printf '%s: %s\n' "$(basename "$0")" "$*" >&2
    exit 1
}
