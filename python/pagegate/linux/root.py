"""The root file system on a guest's disk: what an initrd does to mount it and to start the init that is there."""

FILE_SYSTEM = "ext4"
"""What is taken for its type where the command line has no rootfstype=. The module mounts ext2 and ext3, too."""

# The words are those that the kernel itself understands where it mounts the root file system without an initrd. The
# shell is the guest's first process: when it ends the kernel panics, and what a terminal has not written by then is
# lost. So the reason goes to the kernel's log, as an error: consoles get those at once, and also if it is quiet.
SWITCH = """\
set -f
fail() { echo "<3>pagegate: $*" >/dev/kmsg; exit 1; }
root= type= flags= mode=ro init=/sbin/init patience=10
for word in $(cat /proc/cmdline); do
    case $word in
        --) break ;;
        root=*) root=${word#*=} ;;
        rootfstype=*) type="-t ${word#*=}" ;;
        rootflags=*) flags=,${word#*=} ;;
        ro | rw) mode=$word ;;
        rootwait) patience=-1 ;;
        init=*) init=${word#*=} ;;
    esac
done
[ -n "$root" ] || fail "the command line names no root file system, as root=/dev/vda does"
device() { case $root in UUID=* | LABEL=*) findfs "$root" 2>/dev/null ;; *) echo "$root" ;; esac; }
until device=$(device) && [ -b "$device" ]; do
    [ $patience != 0 ] || fail "there is no $root; there are: $(ls /sys/class/block | tr '\\n' ' ')"
    patience=$((patience - 1))
    sleep 1
done
mkdir /sysroot
mount $type -o "$mode$flags" "$device" /sysroot || fail "$root cannot be mounted"
[ -e "/sysroot$init" ] || [ -L "/sysroot$init" ] || fail "there is no $init on $root"
for directory in dev proc sys; do
    mount -o move /$directory /sysroot/$directory 2>/dev/null || umount -l /$directory
done
exec switch_root /sysroot "$init" "$@"
"""
"""The end of an initrd's /init, as a script of busybox's shell."""


def value(command_line: str, key: str) -> str | None:
    """Return what a kernel's command line says for this key; the last word wins. None if it has no such word."""
    found = [word.partition("=")[2] for word in words(command_line) if word.startswith(f"{key}=")]
    return found[-1] if found else None


def words(command_line: str) -> list[str]:
    """The kernel's own words of a command line: what comes after ``--`` is for the first program."""
    given = command_line.split()
    return given[: given.index("--")] if "--" in given else given
