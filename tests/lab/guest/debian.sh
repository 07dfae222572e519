#!/bin/bash
# A real Debian 12 guest: mmdebstrap, a Debian kernel, GRUB for BIOS, a getty on the serial console. Root (chroot), no loop device; some 140 s.
#
#   debian.sh DIR [KERNEL-PACKAGE]     makes DIR/debian.raw and DIR/payload.sha256, unless they are there and made by this very script
#
# MODULES=vmware  the initrd holds what an installation on VMware holds, and no virtio: on KVM it stops before its root is found.
# SIZE_MB=1536    size of the disk.      APT_SOURCES=FILE   where packages come from; default: this machine's own sources.
# Packages: mmdebstrap grub-pc-bin grub2-common eatmydata fdisk e2fsprogs python3
set -euo pipefail
export LC_ALL=C PATH="$PATH:/usr/sbin:/sbin" SOURCE_DATE_EPOCH=1700000000
say() { echo "debian.sh: $*" >&2; exit 1; }

[ $# -ge 1 ] || say "usage: debian.sh DIR [KERNEL-PACKAGE]"
[ "$(id -u)" = 0 ] || say "needs root (chroot)"
SELF=$(readlink -f "$0")
OUT=$(mkdir -p "$1" && cd "$1" && pwd)
KERNEL=${2:-linux-image-amd64}
STAMP="$(sha256sum < "$SELF" | cut -c1-64) $KERNEL ${MODULES:-most} ${SIZE_MB:-1536}"
exec 9> "$OUT/.lock"
flock 9
if [ -s "$OUT/debian.raw" ] && [ "$(cat "$OUT/.stamp" 2> /dev/null)" = "$STAMP" ]; then exit 0; fi

MISSING=
for tool in mmdebstrap grub-mkimage sfdisk mke2fs python3; do command -v "$tool" > /dev/null || MISSING="$MISSING $tool"; done
[ -z "$MISSING" ] || say "missing:$MISSING (packages: mmdebstrap grub-pc-bin grub2-common eatmydata fdisk e2fsprogs python3)"

WORK=$(mktemp -d "$OUT/.work.XXXXXX")
trap 'rm -rf "$WORK"' EXIT
cd "$WORK"
SOURCES=${APT_SOURCES:-/etc/apt/sources.list.d/debian.sources}
[ -f "$SOURCES" ] || SOURCES=/etc/apt/sources.list
mmdebstrap --mode=root --variant=minbase --format=directory --quiet \
  --include="systemd-sysv,udev,dbus,$KERNEL,initramfs-tools,iproute2,ifupdown,isc-dhcp-client,login,passwd,kmod,e2fsprogs,grub2-common,grub-pc-bin" \
  --hook-dir=/usr/share/mmdebstrap/hooks/eatmydata \
  --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
  --aptopt='Apt::Install-Recommends "false"' bookworm root "$SOURCES" > log 2>&1 || { tail -n 20 log >&2; say "mmdebstrap failed"; }

UUID=6d696772-6174-4e4f-8000-000000000001
mkdir -p root/etc/default
cat > root/etc/default/grub <<'GRUB'
GRUB_DEFAULT=0
GRUB_TIMEOUT=0
GRUB_CMDLINE_LINUX="console=tty0 console=ttyS0,115200"
GRUB_TERMINAL="console serial"
GRUB_SERIAL_COMMAND="serial --unit=0 --speed=115200"
GRUB
echo migguest > root/etc/hostname
echo "UUID=$UUID / ext4 errors=remount-ro 0 1" > root/etc/fstab
printf 'auto lo\niface lo inet loopback\nallow-hotplug ens192\niface ens192 inet dhcp\n' > root/etc/network/interfaces
echo 'root:migrate' | chroot root chpasswd
mkdir -p root/etc/systemd/system/getty.target.wants
ln -sf /lib/systemd/system/serial-getty@.service root/etc/systemd/system/getty.target.wants/serial-getty@ttyS0.service
if [ "${MODULES:-most}" = vmware ]; then
  echo MODULES=list > root/etc/initramfs-tools/conf.d/modules
  printf 'vmw_pvscsi\nmptspi\nahci\nsd_mod\next4\n' > root/etc/initramfs-tools/modules
  chroot root update-initramfs -u > log 2>&1 || { tail -n 20 log >&2; say "update-initramfs failed"; }
fi
VERSION=$(ls root/lib/modules)
mkdir -p root/boot/grub/i386-pc
cp /usr/lib/grub/i386-pc/*.mod /usr/lib/grub/i386-pc/*.lst root/boot/grub/i386-pc/
cat > root/boot/grub/grub.cfg <<CFG
serial --unit=0 --speed=115200
terminal_input serial console
terminal_output serial console
set timeout=0
search --no-floppy --fs-uuid --set=root $UUID
menuentry 'Debian GNU/Linux' {
  linux /boot/vmlinuz-$VERSION root=UUID=$UUID ro console=tty0 console=ttyS0,115200
  initrd /boot/initrd.img-$VERSION
}
CFG
head -c 4M /dev/urandom > root/root/payload.bin
sha256sum root/root/payload.bin | cut -c1-64 | tee payload.sha256 > root/root/payload.sha256

IMG=debian.raw
SIZE=${SIZE_MB:-1536}
truncate -s "${SIZE}M" $IMG
printf 'label: dos\nstart=2048,type=83,bootable\n' | sfdisk -q $IMG
mke2fs -q -t ext4 -U $UUID -L rootfs -d root -E offset=1048576 $IMG $(((SIZE - 1) * 1024))k
# GRUB without a loop device: boot.img into the MBR, core.img into the gap behind it, with the list of its own blocks patched in.
grub-mkimage -O i386-pc -p "(hd0,msdos1)/boot/grub" -o core.img biosdisk part_msdos ext2 search search_fs_uuid normal linux serial terminal
python3 - "$IMG" <<'PYTHON'
import struct, sys
boot = bytearray(open('/usr/lib/grub/i386-pc/boot.img', 'rb').read())
core = bytearray(open('core.img', 'rb').read())
sectors = (len(core) + 511) // 512
assert sectors < 2047, f'core.img of {sectors} sectors does not fit before the first partition'
core += b'\0' * (sectors * 512 - len(core))
struct.pack_into('<Q', boot, 0x5c, 1)                              # core.img begins in sector 1
boot[0x64] = 0xff                                                  # on the drive that was booted
struct.pack_into('<QHH', core, 512 - 12, 2, sectors - 1, 0x820)    # the rest of it: from sector 2, to segment 0x820
with open(sys.argv[1], 'r+b') as disk:
    table = disk.read(512)[440:]
    disk.seek(0)
    disk.write(bytes(boot[:440]) + table)
    disk.seek(512)
    disk.write(core)
PYTHON

rm -f "$OUT/.stamp"
mv $IMG payload.sha256 "$OUT/"
echo "$STAMP" > "$OUT/.stamp"
