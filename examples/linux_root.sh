#!/bin/sh
# Makes a disk with a Debian root file system, for `pagegate boot VMLINUZ --disk IMAGE --append root=/dev/vda`.
#
#   examples/linux_root.sh IMAGE [SUITE]       # as bookworm; by default trixie
#
# There is a login on each console of the kernel, ttyS0 or hvc0; root has no password. With a vsock device there is a
# shell on port 52. Needs the packages mmdebstrap and e2fsprogs, and fakeroot if it is not run as root.
set -eu
image=${1:?usage: examples/linux_root.sh IMAGE [SUITE]} suite=${2:-trixie}

made=$(mktemp -d)
trap 'rm -rf "$made"' EXIT
mkdir -p "$made/etc/systemd/system" "$made/root"
echo guest >"$made/etc/hostname"
echo '/dev/vda / auto defaults 0 0' >"$made/etc/fstab" # remounts it with rw
cat >"$made/etc/systemd/system/vsock-shell.socket" <<'END'
[Unit]
Description=A shell for programs of the host
ConditionPathExists=/dev/vsock

[Socket]
ListenStream=vsock::52
Accept=yes

[Install]
WantedBy=sockets.target
END
cat >"$made/etc/systemd/system/vsock-shell@.service" <<'END'
[Unit]
Description=A shell for a program of the host

[Service]
ExecStart=-/bin/sh
StandardInput=socket
StandardOutput=socket
StandardError=socket
END

# The kernel's modules come with the initrd. What is masked would start terminals that are not there and look for LVM.
mmdebstrap --quiet --variant=minbase --include=systemd-sysv,udev \
    --dpkgopt='path-exclude=/usr/share/doc/*' \
    --dpkgopt='path-exclude=/usr/share/locale/*' \
    --dpkgopt='path-exclude=/usr/share/man/*' \
    --customize-hook="copy-in $made/etc /" \
    --customize-hook='chroot "$1" passwd --quiet --delete root' \
    --customize-hook='chroot "$1" systemctl --quiet enable vsock-shell.socket' \
    --customize-hook='chroot "$1" systemctl --quiet mask getty-static.service e2scrub_reap.service' \
    "$suite" "$made/root.tar"

rm -f "$image"
truncate -s 512M "$image"
# mke2fs takes an archive only if it was built so. As root it needs no fakeroot.
as=
[ "$(id -u)" = 0 ] || as=fakeroot
$as sh -c 'tar -x -C "$1/root" -f "$1/root.tar" && mke2fs -q -t ext4 -d "$1/root" "$2"' sh "$made" "$image"
