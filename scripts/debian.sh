# SPDX-License-Identifier: GPL-2.0-or-later
# shellcheck shell=sh
#
# Debian's packages, by an apt set-up of our own: the system's lists stay as
# they are.  Included by scripts/sources and scripts/deps.

# Sets debian to the code name if this is a Debian we know, else to nothing
detect_debian()
{
    debian=$(. /etc/os-release 2>/dev/null
             [ "${ID:-}" = debian ] && echo "${VERSION_CODENAME:-}") || :
    case $debian in
    bookworm|trixie) ;;
    *) debian= ;;
    esac
}

# The system's package sources, one archive a paragraph, with the suites we
# need instead of those it has: where the archive is and by which key it is
# signed is the system's business.
our_sources()
{
    for _f in /etc/apt/sources.list /etc/apt/sources.list.d/*.list; do
        [ -f "$_f" ] && cat "$_f"
    done | sed -n -e 's/#.*//' -e 's/^[[:space:]]*deb[[:space:]]\{1,\}//p' |
    while read -r _line; do
        _key=
        case $_line in
        '['*)
            _key=$(printf '%s\n' "${_line%%]*}" | tr '[ ' '\n\n' |
                   sed -n 's/^signed-by=//p')
            _line=${_line#*]} ;;
        esac
        # shellcheck disable=SC2086
        set -- $_line
        [ $# -ge 2 ] || continue
        printf 'URIs: %s\nSuites: %s\n' "$1" "$2"
        [ -z "$_key" ] || printf 'Signed-By: %s\n' "$_key"
        echo
    done >"$1.in"
    for _f in /etc/apt/sources.list.d/*.sources; do
        [ -f "$_f" ] && grep -v '^#' "$_f" && echo
    done >>"$1.in" || :

    awk -v code="$debian" '
        BEGIN { RS = ""; FS = "\n" }
        function stanza(types, suites) {
            print "Types: " types "\nURIs: " uris "\nSuites: " suites
            print "Components: main"
            if (types == "deb") print "Architectures: amd64"
            print key
        }
        {
            uris = suites = key = ""; enabled = 1; deb = 1; field = ""
            for (i = 1; i <= NF; i++) {
                value = $i
                if ($i ~ /^[^ \t]/) {
                    field = tolower($i); sub(/:.*/, "", field)
                    sub(/^[^:]*:[ \t]*/, "", value)
                }
                if (field == "uris") uris = uris " " value
                else if (field == "suites") suites = suites " " value
                else if (field == "signed-by") key = key $i "\n"
                else if (field == "enabled" && value ~ /^(no|false)/) enabled = 0
                else if (field == "types" && value !~ /(^| )deb( |$)/) deb = 0
            }
            if (!enabled || !deb || seen[uris, suites]++) next
            n = split(suites, s, " ")
            main = security = 0
            for (i = 1; i <= n; i++) {
                if (s[i] == code || s[i] ~ /^(old)*stable$/) main = 1
                if (s[i] == code "-security" || s[i] ~ /^(old)*stable-security$/) security = 1
            }
            # QEMU 10.0 and Bochs 3.0 are those of Debian 13
            if (main && !have[uris, "m"]++) {
                stanza("deb", code " " code "-updates " code "-backports")
                stanza("deb-src", "trixie trixie-updates")
            }
            if (security && !have[uris, "s"]++) {
                stanza("deb", code "-security")
                stanza("deb-src", "trixie-security")
            }
        }' "$1.in" >"$1"
    rm -f "$1.in"
}

# apt_setup CACHE: private lists, brought up to date
apt_setup()
{
    apt=$1/apt
    mkdir -p "$apt/lists/partial" "$apt/cache/archives/partial"
    our_sources "$apt/kvmi.sources"
    [ -s "$apt/kvmi.sources" ] || die \
        "the system's package sources don't name Debian's archive for $debian" \
        "Looked in /etc/apt/sources.list and /etc/apt/sources.list.d." \
        "Add it there, or give the sources by --with-linux-source=, --with-qemu-source=," \
        "--with-bochs-source= and --with-kernel-headers=."
    # Those of an hour ago are new enough
    if [ -n "$(find "$apt/updated" -mmin -60 2>/dev/null)" ] &&
       cmp -s "$apt/kvmi.sources" "$apt/updated"; then
        return
    fi
    step APT "reading the package lists"
    need_space "$apt" 300 "the package lists"
    # In the foreground: Ctrl-C is for apt, too
    # shellcheck disable=SC2046
    timeout --foreground 900 apt-get $(apt_options) -q update >"$apt/update.log" 2>&1 </dev/null || {
        # On a full disk apt may wait for ever
        [ $? != 124 ] || echo "E: apt-get update took more than 15 minutes" >>"$apt/update.log"
        check_disk_full "$apt"
    }
    grep -E '^(W|E|Err)' "$apt/update.log" >"$apt/update.err" ||
        cp "$apt/kvmi.sources" "$apt/updated"
}

apt_options()
{
    echo "-o Dir::Etc::sourcelist=$apt/kvmi.sources -o Dir::Etc::sourceparts=/dev/null" \
         "-o Dir::State::lists=$apt/lists -o Dir::Cache=$apt/cache" \
         "-o Dir::Cache::pkgcache=pkgcache.bin -o Dir::Cache::srcpkgcache=srcpkgcache.bin" \
         "-o APT::Sandbox::User=$(id -un) -o Acquire::Languages=none" \
         "-o Acquire::Retries=2 -o Acquire::http::Timeout=30 -o Acquire::https::Timeout=30"
}

# What a message of apt means; sets fetch_error
explain_apt()
{
    if grep -qE 'No space left|enough free space' "$1"; then
        fetch_error="The disk with $apt is full: $(free_mb "$apt") MB left. Free some space, or use --cache=DIR."
    elif grep -qE 'Could not (resolve|connect)|Unable to connect|Connection (failed|refused|timed out)|Temporary failure|Network is unreachable|Cannot initiate|connection timed out' "$1"; then
        fetch_error="There is no network to Debian's archive, or the proxy of apt is wrong. apt says:
    $(grep -E '^(W|E|Err|  )' "$1" | head -n 2)"
    elif grep -qE ' 404 ' "$1"; then
        fetch_error="The archive no longer has it (404)."
    elif grep -qE 'Hash Sum mismatch|unexpected size' "$1"; then
        fetch_error="What came is not what the archive's lists say; try again later."
    else
        fetch_error="apt says: $(grep -E '^(W|E|Err)' "$1" | head -n 3)"
    fi
}

# apt_fetch CACHE download|source|tarball PACKAGE...
#
# Into CACHE/downloads; a file appears there when it is complete and its
# checksum is right.  What an interrupted run left is continued.
apt_fetch()
{
    _dl=$1/downloads _what=$2
    shift 2
    _partial=$_dl/partial/$(printf %s "$*" | tr -c 'a-zA-Z0-9.+~-' _)
    mkdir -p "$_partial"
    case $_what in
    source) _what="source --download-only" ;;
    tarball) _what="source --download-only --tar-only" ;;
    esac
    (
        cd "$_partial" || exit 1
        # shellcheck disable=SC2046,SC2086
        if [ -t 1 ]; then
            timeout --foreground 3600 apt-get $(apt_options) $_what "$@" 2>"$apt/fetch.log"
        else
            timeout --foreground 3600 apt-get -q $(apt_options) $_what "$@" >"$apt/fetch.out" 2>"$apt/fetch.log"
        fi
    ) </dev/null || {
        explain_apt "$apt/fetch.log"
        return 1
    }
    mv "$_partial"/* "$_dl/"
    rmdir "$_partial"
}
