# SPDX-License-Identifier: GPL-2.0-or-later
# shellcheck shell=sh
#
# Shell functions shared by configure and the scripts beside this file.
# The caller sets "top" to the source folder and includes it.

LC_ALL=C
PATH=$PATH:/usr/sbin:/sbin
export LC_ALL PATH

default_cache=${XDG_CACHE_HOME:-$HOME/.cache}/kvmi

step() { printf '  %-9s %s\n' "$1" "$2"; }
warn() { printf 'warning: %s\n' "$*" >&2; }

# die WHAT [WHAT-TO-DO...]: one line each
die()
{
    printf '%s: error: %s\n' "${0##*/}" "$1" >&2
    shift
    [ $# = 0 ] || printf '    %s\n' "$@" >&2
    exit 1
}

# Sets B, the build folder: the current folder if it was configured, else
# build/ in the source folder.  KVMI_BUILD=DIR overrides.
find_build()
{
    if [ -n "${KVMI_BUILD:-}" ]; then
        B=$KVMI_BUILD
    elif [ -f config.sh ] && [ -f build.ninja ]; then
        B=$(pwd)
    else
        B=$top/build
    fi
}

# Is what configure found still there? The cache may have gone.
sources_there()
{
    (. "$B/config.sh" && [ -d "$LINUX_SRC" ] && [ -d "$QEMU_SRC" ] && [ -d "${BOCHS_SRC:-}" ] &&
        [ -d "$KERNEL_HEADERS" ] && [ -d "$KERNEL_IMAGE_ROOT" ])
}

# Also reads what configure found out
load_config()
{
    find_build
    [ -f "$B/config.sh" ] || die "$B is not configured" "Run ./configure first."
    B=$(cd "$B" && pwd)
    . "$B/config.sh"
    sources_there || die "the sources are no longer in $CACHE" "Run ./configure again."
    jobs=$(nproc 2>/dev/null || echo 2)
}

# Makes sure that there is a build folder in which everything is built.
# For the commands that do it all by themselves.
build_all()
{
    find_build
    if ! [ -f "$B/config.sh" ] || ! [ -f "$B/build.ninja" ] ||
       ! sources_there || ! "$top/scripts/deps" --quiet; then
        mkdir -p "$B"
        # Again with the options it had, if this is not the first time
        _args=$(sed -n "s/^CONFIGURE_ARGS='\(.*\)'$/\1/p" "$B/config.sh" 2>/dev/null) || :
        # shellcheck disable=SC2086
        (cd "$B" && "$top/configure" $_args --install-deps) || exit 1
    fi
    B=$(cd "$B" && pwd)
    export KVMI_BUILD="$B"
    ninja -C "$B" || die "the build failed" "The first error above says why."
}

free_mb() { df -Pm "$1" 2>/dev/null | awk 'NR == 2 { print $4 }'; }

# need_space DIR MEGABYTES WHAT
need_space()
{
    _free=$(free_mb "$1")
    [ "${_free:-$2}" -ge "$2" ] || die \
        "not enough space for $3: $1 has $_free MB free, $2 MB are needed" \
        "Free some space, or choose other places: ./configure --cache=DIR," \
        "and run configure in another folder to build there."
}

# After a failure: was it the disk?
check_disk_full()
{
    for _d; do
        [ -d "$_d" ] || continue
        _free=$(free_mb "$_d")
        [ "${_free:-100}" -ge 20 ] || die "the disk with $_d is full" \
            "Free some space and run the same command again; it carries on."
    done
}

# run_logged LOG COMMAND...: output goes to LOG, the gist of it to the
# terminal if the command fails
run_logged()
{
    _log=$1
    shift
    "$@" >"$_log" 2>&1 </dev/null && return
    # The errors if it tells any, else its end; compilers' command lines are long
    { grep -E -A 3 'error:|ERROR:|undefined reference|\*\*\*' "$_log" || tail -n 20 "$_log"; } |
        cut -c 1-200 | head -n 40 >&2
    check_disk_full "$(dirname "$_log")" "${CACHE:-/tmp}"
    return 1
}

# One file at a time by one process: waits for the other one at most an hour
lock()
{
    exec 9>"$1"
    flock -n 9 && return
    echo "Another run is busy with ${1%/*}; waiting for it."
    flock -w 3600 9 || die "still busy after an hour: $1" \
        "Look for a hanging ./configure, ninja or scripts/sources."
}

setup_ccache()
{
    CCACHE=
    if [ "${USE_CCACHE:-yes}" = yes ] && command -v ccache >/dev/null; then
        CCACHE=ccache
        # Paths below the build folder are cached as relative ones, so that
        # another clone finds what this one has compiled
        export CCACHE_DIR="${CCACHE_DIR:-$CACHE/ccache}" CCACHE_BASEDIR="$B"
        export CCACHE_NOHASHDIR=1 CCACHE_MAXSIZE="${CCACHE_MAXSIZE:-3G}"
        export CCACHE_SLOPPINESS=include_file_mtime,include_file_ctime
    fi
}

# source_id DIR: a name for what is made of a source tree.  Those in the cache
# stay as they are, one that was given may be of another version tomorrow.
source_id()
{
    case $1 in
    "$CACHE"/src/*) echo "${1##*/}" ;;
    *)  echo "${1##*/}-$({
            echo "$1"
            [ ! -e "$1/.git" ] || git -C "$1" rev-parse HEAD
            cat "$1/Makefile" "$1/VERSION" || :
        } 2>/dev/null | cksum | cut -d ' ' -f 1)" ;;
    esac
}

# ---- hooks and new files ----------------------------------------------------
#
# linux/patches/series and qemu/patches/series list, in this order, what makes
# up our change to a source tree; one step a line:
#
#   0001-name.patch           a hook patch (subject, text, diff)
#   + name.msg PATH...        new files of ours: those at PATH (a file or a
#                             folder) that no line above has; name.msg holds
#                             the subject and the text of the commit
#   # comment

# series_lines OURS
series_lines()
{
    if [ -f "$1/patches/series" ]; then
        sed -e 's/#.*//' -e 's/[[:space:]]*$//' -e '/^$/d' "$1/patches/series"
    else
        (cd "$1/patches" 2>/dev/null && ls -- *.patch 2>/dev/null) || :
    fi
}

# new_files OURS: the files of ours, by their path in the source tree
new_files()
{
    (cd "$1" && find . -type f ! -path './patches/*' ! -path './modules/*' \
        ! -name '*~' ! -name '.*' ! -name '*.orig' ! -name '*.rej' |
        sed 's,^\./,,' | sort)
}

# git apply without the repository that may be around the folder
plain_git_apply()
{
    GIT_CEILING_DIRECTORIES=$(dirname "$(pwd)") git apply --whitespace=nowarn "$@"
}

# apply_patch PATCH [--include=PATTERN...], in the current folder
apply_patch()
{
    _patch=$1
    shift
    plain_git_apply "$@" "$_patch" 2>/dev/null && return
    plain_git_apply --reject --verbose "$@" "$_patch" 2>&1 |
        awk -v p="${_patch##*/}" '
            /^(error: )?Checking patch / { file = $NF; sub(/\.\.\.$/, "", file) }
            /^Applying patch / { file = $3 }
            /^Rejected hunk/ { sub(/^Rejected /, ""); sub(/\.$/, "")
                               print "    " p ": " file ": " $0 " does not apply" }
            /No such file|corrupt|patch fragment|already exists/ { print "    " p ": " $0 }' >&2
    die "the patch ${_patch##*/} does not fit this source tree" \
        "The hooks are made for ${FITS:-another version}; the lines above name file and hunk." \
        "Adapt it by hand: $_patch" \
        "Then run the same again; in the end scripts/edit and scripts/refresh make it tidy."
}

# lay_tree PRISTINE OURS DEST [PATH...]
#
# Makes DEST = PRISTINE (or just those PATHs of it) + patches + new files.
# Later calls write only the files whose content changes, so that make and
# ninja compile just those.  EXTRA="FROM TO" is one more new file.
lay_tree()
{
    _pristine=$1 _ours=$2 _dest=$3
    shift 3
    _stage=$_dest.stage
    _from="$_pristine $(source_id "$_pristine") $*"
    if [ "$(cat "$_dest.from" 2>/dev/null)" != "$_from" ]; then
        rm -rf "$_dest" "$_dest.list"
        mkdir -p "$_dest"
        # (quoted so by intention: a PATH may be a pattern)
        # shellcheck disable=SC2048,SC2086
        (cd "$_pristine" && tar -cf - --exclude=.git ${*:-.}) | tar -xf - -C "$_dest" ||
            { check_disk_full "$_dest"; die "cannot copy $_pristine to $_dest"; }
        echo "$_from" >"$_dest.from"
    fi
    rm -rf "$_stage"
    mkdir -p "$_stage"

    # Only hunks for the PATHs: the rest of the tree isn't here
    _includes=
    for _p; do _includes="$_includes --include=$_p --include=$_p/*"; done
    set -f
    series_lines "$_ours" | grep -v '^+' >"$_stage.patches" || :
    while read -r _p; do
        [ -f "$_ours/patches/$_p" ] ||
            die "$_ours/patches/series names $_p, which does not exist"
        # shellcheck disable=SC2086
        (cd "$_stage" && plain_git_apply --numstat $_includes "$_ours/patches/$_p") ||
            die "$_ours/patches/$_p is not a patch"
    done <"$_stage.patches" >"$_stage.stat"
    cut -f 3 "$_stage.stat" | sort -u | while read -r _f; do
        if [ -f "$_pristine/$_f" ]; then
            mkdir -p "$_stage/$(dirname "$_f")"
            cp "$_pristine/$_f" "$_stage/$_f"
        fi
    done
    while read -r _p; do
        # shellcheck disable=SC2086
        (cd "$_stage" && apply_patch "$_ours/patches/$_p" $_includes) || exit 1
    done <"$_stage.patches"
    set +f

    new_files "$_ours" | while read -r _f; do
        [ ! -e "$_pristine/$_f" ] ||
            die "$_ours/$_f replaces a file of the source tree" \
                "Change files that exist by a patch in $_ours/patches."
        mkdir -p "$_stage/$(dirname "$_f")"
        cp "$_ours/$_f" "$_stage/$_f"
    done || exit 1
    # shellcheck disable=SC2086
    if [ -n "${EXTRA:-}" ]; then
        set -- $EXTRA
        mkdir -p "$_stage/$(dirname "$2")"
        cp "$1" "$_stage/$2"
    fi

    (cd "$_stage" && find . -type f | sort) >"$_dest.list.new"
    while read -r _f; do
        cmp -s "$_stage/$_f" "$_dest/$_f" && continue
        mkdir -p "$_dest/$(dirname "$_f")"
        cp "$_stage/$_f" "$_dest/$_f" || { check_disk_full "$_dest"; exit 1; }
    done <"$_dest.list.new"
    if [ -f "$_dest.list" ]; then
        # What we no longer touch becomes pristine again, or goes
        comm -23 "$_dest.list" "$_dest.list.new" | while read -r _f; do
            if [ -f "$_pristine/$_f" ]; then
                cp "$_pristine/$_f" "$_dest/$_f"
            else
                rm -f "$_dest/$_f"
            fi
        done
    fi
    mv "$_dest.list.new" "$_dest.list"
    rm -rf "$_stage" "$_stage.patches" "$_stage.stat"
}

# checksum of the content of files and folders
fingerprint()
{
    find "$@" -type f ! -name '*~' -exec sha256sum {} + | sort | sha256sum
}
