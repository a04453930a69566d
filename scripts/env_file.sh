# shellcheck shell=sh
# Sourced by the scripts beside it. Reads NAME=value lines of a file as Docker does, without running anything in it.
#
# load_env FILE NAME...   sets and exports each NAME that the file names and the environment does not.
load_env() {
    _file=$1
    shift
    [ -f "$_file" ] || return 0
    for _name in "$@"; do
        eval "[ -z \"\${$_name+x}\" ]" || continue # a name of ours, never text of the file
        # The last line that names it; spaces before the name are let pass, quotes are part of the value.
        _value=$(sed -n "s/^[[:space:]]*$_name=//p" "$_file" | tr -d '\r' | tail -n 1)
        [ -n "$_value" ] && export "$_name=$_value"
    done
    return 0
}
