# SPDX-License-Identifier: GPL-2.0-or-later
# shellcheck shell=sh
#
# Our change to a source tree as a series of commits.  Included by
# scripts/edit, scripts/refresh and scripts/export-series, after lib.sh.

# pick_tree linux|qemu: sets kind, pristine, what, ours and context, the lines
# of context in the hook patches: fewer than usual for Linux, whose stable
# versions change the surroundings of a hook more often than the place itself
pick_tree()
{
    kind=$1
    case $kind in
    linux) pristine=$LINUX_SRC what="Linux $LINUX_VER" FITS="Linux 6.12.y" context=2 ;;
    qemu) pristine=$QEMU_SRC what="QEMU $QEMU_VER" FITS="QEMU 10.0.y" context=3 ;;
    *) die "linux or qemu, not \"$kind\"" ;;
    esac
    ours=$top/$kind
    [ -d "$ours/patches" ] || die "there is no $ours/patches"
}

# The name under which commits are made, if the patch has none
identity()
{
    name=$(git -C "$top" config user.name) || name=kvmi
    email=$(git -C "$top" config user.email) || email=kvmi@localhost
    export GIT_AUTHOR_NAME="$name" GIT_AUTHOR_EMAIL="$email"
    export GIT_COMMITTER_NAME="$name" GIT_COMMITTER_EMAIL="$email"
    export GIT_CONFIG_NOSYSTEM=1 GIT_CONFIG_GLOBAL=/dev/null
}

# Sets base to a bare repository with the pristine tree as its one commit;
# made once per version, which takes a minute or two for Linux
base_repo()
{
    base=$CACHE/git/$(source_id "$pristine").git
    mkdir -p "$CACHE/git"
    lock "$CACHE/git/lock"
    if [ ! -d "$base" ]; then
        step GIT "a repository of $what, once"
        need_space "$CACHE" 600 "the repository"
        rm -rf "$base.tmp"
        git init -q --bare -b base "$base.tmp"
        (
            export GIT_DIR="$base.tmp" GIT_WORK_TREE="$pristine"
            git config core.bare false
            git config core.autocrlf false
            # The tree's own .gitignore has nothing to say about this
            git add -A -f . || exit
            # That of Debian's kernel ignores whatever is new
            if [ -f "$pristine/.gitignore" ]; then
                object=$(sed -e '/^\/\*$/d' -e '/^!\/debian\/$/d' "$pristine/.gitignore" |
                         git hash-object -w --stdin) &&
                    git update-index --cacheinfo "100644,$object,.gitignore" || exit
            fi
            git commit -q -m "$what" && git tag pristine
        ) || { check_disk_full "$CACHE"; die "cannot make a repository of $pristine"; }
        git -C "$base.tmp" config core.bare true
        mv "$base.tmp" "$base"
    fi
    exec 9>&-
}

# The commit message in a patch: subject and text
patch_message()
{
    awk '
        /^(---|diff --git )/ { exit }
        body { print; next }
        tolower($0) ~ /^subject:/ { sub(/^[^:]*:[ \t]*/, ""); sub(/^\[[^]]*\][ \t]*/, ""); subject = $0; in_subject = 1; next }
        in_subject && /^[ \t]/ { sub(/^[ \t]+/, " "); subject = subject $0; next }
        /^$/ && subject != "" { print subject "\n"; body = 1; next }
        { in_subject = 0 }' "$1"
}

patch_author() { sed -n -e '/^$/q' -e 's/^From: *//p' "$1" | head -n 1; }

# files_at OURS PATH...: the new files at these paths
files_at()
{
    _ours=$1
    shift
    new_files "$_ours" | while read -r _f; do
        for _p; do
            # shellcheck disable=SC2254
            case $_f in
            $_p|${_p%/}/*) echo "$_f"; break ;;
            esac
        done
    done
}

# make_commits REPOSITORY: one commit per line of the series, on the branch
# kvmi.  Works on the index only, so the tree need not be checked out.
make_commits()
{
    repo=$1
    identity
    git clone -q --shared --no-checkout "$base" "$repo"
    git -C "$repo" config user.name "$name"
    git -C "$repo" config user.email "$email"
    # What is on disk must come back byte for byte
    git -C "$repo" config core.autocrlf false
    git -C "$repo" update-ref refs/heads/kvmi pristine
    git -C "$repo" symbolic-ref HEAD refs/heads/kvmi
    git -C "$repo" read-tree pristine
    msg=$repo/.git/kvmi-message
    : >"$repo/.git/kvmi-done"
    series_lines "$ours" | while read -r line; do
        set -f
        # shellcheck disable=SC2086
        set -- $line
        set +f
        author=
        if [ "$1" = + ]; then
            shift
            [ -f "$ours/patches/$1" ] || die "$ours/patches/series names $1, which does not exist"
            cp "$ours/patches/$1" "$msg"
            shift
            files_at "$ours" "$@" | sort >"$repo/.git/kvmi-files"
            comm -23 "$repo/.git/kvmi-files" "$repo/.git/kvmi-done" |
                while read -r f; do
                    mode=100644
                    [ ! -x "$ours/$f" ] || mode=100755
                    object=$(git -C "$repo" hash-object -w --no-filters "$ours/$f")
                    git -C "$repo" update-index --add --cacheinfo "$mode,$object,$f"
                done
            sort -u -o "$repo/.git/kvmi-done" "$repo/.git/kvmi-done" "$repo/.git/kvmi-files"
        else
            [ -f "$ours/patches/$1" ] || die "$ours/patches/series names $1, which does not exist"
            patch_message "$ours/patches/$1" >"$msg"
            [ -s "$msg" ] || die "the patch $1 has no Subject: line"
            author=$(patch_author "$ours/patches/$1")
            git -C "$repo" apply --cached --whitespace=nowarn "$ours/patches/$1" 2>"$repo/.git/kvmi-err" || {
                cat "$repo/.git/kvmi-err" >&2
                die "the patch $1 does not fit $what with what is before it in the series" \
                    "Adapt it by hand: $ours/patches/$1" "Then run the same again."
            }
        fi
        git -C "$repo" commit -q --no-verify --cleanup=whitespace ${author:+--author="$author"} -F "$msg" ||
            die "nothing new in this line of $ours/patches/series: $line"
    done || exit 1
    new_files "$ours" | comm -23 - "$repo/.git/kvmi-done" >"$repo/.git/kvmi-left"
    if [ -s "$repo/.git/kvmi-left" ]; then
        cat "$repo/.git/kvmi-left" >&2
        die "no line of $ours/patches/series has the new files above" \
            "Add a line: + name.msg PATH..., where patches/name.msg is the commit's message."
    fi
}
