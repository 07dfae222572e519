#!/bin/bash
# The tiny guest: Debian's cloud kernel and a busybox initramfs on a BIOS-bootable MBR disk of 256 MiB, of which 30 MB are data.
# No root, no loop device, no mount. Under TCG it reaches TINYGUEST-LOGIN in some 7 s, having printed the SHA-256 of its payload.
#
#   tiny.sh DIR     makes DIR/tiny.raw and DIR/payload.sha256, unless they are there and made by this very script
#
# Kernel arguments (env APPEND): `writer` keeps changing the data partition, and says what is safe there (file `log`: the same number), `poweroff` stops after the payload was printed.
# `agent` runs what a QEMU guest agent does (freeze, thaw, shutdown), where the machine has its port; `{"execute":"test-mode","arguments":{"mode":M}}`
# makes it `slow` (freezes, and says so 6 s later), `refuse` to freeze, or `thaw` by itself; `plain` again.
# Packages: busybox-static cpio kmod fdisk e2fsprogs mtools syslinux, and apt-get for the kernel's package.
set -euo pipefail
export LC_ALL=C PATH="$PATH:/usr/sbin:/sbin"
say() { echo "tiny.sh: $*" >&2; exit 1; }

[ $# = 1 ] || say "usage: tiny.sh DIR"
SELF=$(readlink -f "$0")
mkdir -p "$1"
OUT=$(cd "$1" && pwd)
STAMP="$(sha256sum < "$SELF" | cut -c1-64) ${APPEND:-}"

# Two test runs may ask at once; the second finds what the first made.
exec 9> "$OUT/.lock"
flock 9
if [ -s "$OUT/tiny.raw" ] && [ -s "$OUT/payload.sha256" ] && [ "$(cat "$OUT/.stamp" 2>/dev/null)" = "$STAMP" ]; then exit 0; fi

MISSING=
for tool in busybox cpio modprobe depmod sfdisk mke2fs mformat mcopy syslinux apt-get dpkg-deb; do
  command -v "$tool" > /dev/null || MISSING="$MISSING $tool"
done
[ -f /usr/lib/SYSLINUX/mbr.bin ] || MISSING="$MISSING /usr/lib/SYSLINUX/mbr.bin"
[ -z "$MISSING" ] || say "missing:$MISSING (packages: busybox-static cpio kmod fdisk e2fsprogs mtools syslinux)"

WORK=$(mktemp -d "$OUT/.work.XXXXXX")
trap 'rm -rf "$WORK"' EXIT
cd "$WORK"

# The kernel: unpacked, never installed; the package is kept for the next time.
KERNEL=$(apt-cache depends linux-image-cloud-amd64 2> /dev/null | awk '/Depends: linux-image/ { print $2; exit }')
[ -n "$KERNEL" ] || say "apt knows no linux-image-cloud-amd64; run apt-get update"
DEB=$(find "$OUT" -maxdepth 1 -name "${KERNEL}_*.deb" | sort | tail -n 1)
if [ -z "$DEB" ]; then
  apt-get -qq -o APT::Sandbox::User=root download "$KERNEL" || say "apt-get could not download $KERNEL; run apt-get update"
  mv "$KERNEL"_*.deb "$OUT/"
  DEB=$(find "$OUT" -maxdepth 1 -name "${KERNEL}_*.deb" | sort | tail -n 1)
fi
mkdir kernel
dpkg-deb -x "$DEB" kernel
cp kernel/boot/vmlinuz-* vmlinuz
VERSION=$(basename kernel/boot/vmlinuz-*)
VERSION=${VERSION#vmlinuz-}

# The initramfs: busybox and the modules of the disk controllers that source and target have.
mkdir -p ird/bin ird/dev ird/proc ird/sys ird/mnt ird/lib/modules
cp "$(command -v busybox)" ird/bin/busybox
depmod -b kernel "$VERSION"
for module in virtio_pci virtio_blk virtio_scsi virtio_net virtio_console vmw_pvscsi sd_mod ata_piix; do
  modprobe -d kernel -S "$VERSION" --show-depends "$module" 2> /dev/null | awk '$1 == "insmod" { print $2 }' || true
done | awk '!seen[$0]++' > modules
[ -s modules ] || say "the kernel's package holds none of the modules"
while read -r file; do
  cp "$file" ird/lib/modules/
  basename "$file" >> ird/modorder
done < modules
cat > ird/init <<'INIT'
#!/bin/busybox sh
/bin/busybox --install -s /bin 2>/dev/null
export PATH=/bin
mount -t devtmpfs dev /dev; mount -t proc proc /proc; mount -t sysfs sys /sys
exec >/dev/console 2>&1 </dev/console
for m in $(cat /modorder); do insmod /lib/modules/$m 2>/dev/null; done
n=0; while [ $n -lt 50 ]; do for d in vda sda; do [ -b /dev/$d ] && break 2; done; usleep 100000; n=$((n+1)); done
D=; for d in vda sda; do [ -b /dev/$d ] && D=$d && break; done
echo "TINYGUEST-MARKER kernel=$(uname -r) disk=$D size=$(cat /sys/block/$D/size 2>/dev/null)"
for p in /dev/${D}?*; do [ -b $p ] && echo "TINYGUEST-PART $p sectors=$(cat /sys/class/block/${p##*/}/size)"; done
mount -o ro /dev/${D}2 /mnt 2>/dev/null && { echo "TINYGUEST-DATA $(sha256sum /mnt/payload.bin | cut -c1-64)"; cat /mnt/hello.txt; umount /mnt; }
write_on() {
  i=0
  while :; do i=$((i+1)); dd if=/dev/urandom of=/mnt/w.$((i%8)) bs=64k count=4 2>/dev/null; echo $i > /mnt/log; sync; echo "TINYGUEST-WRITE $i"; sleep 1; done; }
grep -q writer /proc/cmdline && { mount /dev/${D}2 /mnt; write_on & echo $! > /writer; }
grep -q agent /proc/cmdline && /agent &
grep -q writer /proc/cmdline && while :; do wait; sleep 1; done
grep -q poweroff /proc/cmdline && poweroff -f
echo "TINYGUEST-LOGIN ready"; exec setsid sh -c 'exec sh </dev/ttyS0 >/dev/ttyS0 2>&1'
INIT
cat > ird/agent <<'AGENT'
#!/bin/busybox sh
# As much of the QEMU guest agent protocol as libvirt speaks to freeze, thaw and shut down a guest.
PORT=
for p in /sys/class/virtio-ports/*; do [ "$(cat $p/name 2>/dev/null)" = org.qemu.guest_agent.0 ] && PORT=/dev/${p##*/}; done
[ -n "$PORT" ] || exit 0
exec 3<>$PORT
MODE=plain FROZEN=0
say() { printf '%s\n' "$1" >&3; }
no() { say "{\"error\": {\"class\": \"GenericError\", \"desc\": \"$1\"}}"; }
thaw() { [ $FROZEN = 1 ] && fsfreeze --unfreeze /mnt; N=$FROZEN; FROZEN=0; }
echo "TINYGUEST-AGENT at $PORT"
while :; do
  read -r LINE <&3 || { usleep 200000; continue; }
  ID=${LINE##*\"id\":}; ID=${ID%%\}*}
  case "$LINE" in
    *'"guest-sync-delimited"'*) printf '\377{"return": %s}\n' "$ID" >&3 ;;
    *'"guest-sync"'*) say "{\"return\": $ID}" ;;
    *'"guest-ping"'*) say '{"return": {}}' ;;
    *'"guest-info"'*) say '{"return": {"version": "7.2.0", "supported_commands": []}}' ;;
    *'"guest-fsfreeze-status"'*) [ $FROZEN = 1 ] && say '{"return": "frozen"}' || say '{"return": "thawed"}' ;;
    *'"guest-fsfreeze-freeze"'*)
      if [ $MODE = refuse ]; then no "a file system does not freeze"; continue; fi
      sync; fsfreeze --freeze /mnt && FROZEN=1 || { no "cannot freeze"; continue; }
      echo "TINYGUEST-FROZEN"
      [ $MODE = slow ] && sleep 6
      say "{\"return\": $FROZEN}"
      [ $MODE = thaw ] && thaw ;;
    *'"guest-fsfreeze-thaw"'*) thaw; echo "TINYGUEST-THAWED $N"; say "{\"return\": $N}" ;;
    *'"guest-shutdown"'*)
      echo "TINYGUEST-SHUTDOWN"; thaw; kill $(cat /writer); sync; sleep 1; umount /mnt; poweroff -f ;;
    *'"test-mode"'*) MODE=${LINE##*\"mode\":}; MODE=${MODE#*\"}; MODE=${MODE%%\"*}; say '{"return": {}}' ;;
    *) say '{"error": {"class": "CommandNotFound", "desc": "The command has not been found"}}' ;;
  esac
done
AGENT
chmod +x ird/init ird/agent
(cd ird && find . | sort | cpio -o -H newc --quiet -R 0:0 | gzip -1n) > initrd.gz

# The disk: partition 1 is a FAT with syslinux, partition 2 an ext4 with the payload.
IMG=tiny.raw
mkdir data
head -c 8M /dev/urandom > data/payload.bin
echo "hello-from-source-vm" > data/hello.txt
sha256sum data/payload.bin | cut -c1-64 > payload.sha256
truncate -s 256M $IMG
printf 'label: dos\nlabel-id: 0x7e57d15c\nstart=2048,size=131072,type=c,bootable\nstart=133120,type=83\n' | sfdisk -q $IMG
dd if=/usr/lib/SYSLINUX/mbr.bin of=$IMG conv=notrunc bs=440 count=1 status=none
cat > syslinux.cfg <<CFG
SERIAL 0 115200
DEFAULT linux
TIMEOUT 1
PROMPT 0
LABEL linux
  KERNEL /vmlinuz
  INITRD /initrd.gz
  APPEND console=ttyS0,115200 quiet panic=5 ${APPEND:-}
CFG
truncate -s 64M boot.fat
mformat -i boot.fat -F -H 2048 -v BOOT -T 131072 -h 64 -s 32 ::
mcopy -i boot.fat vmlinuz initrd.gz syslinux.cfg ::
syslinux --install boot.fat
dd if=boot.fat of=$IMG bs=1M seek=1 conv=notrunc,sparse status=none
mke2fs -q -t ext4 -L DATA -d data -E offset=$((133120 * 512)) $IMG $(((524288 - 133120) / 2))k

rm -f "$OUT/.stamp"
mv $IMG payload.sha256 "$OUT/"
echo "$STAMP" > "$OUT/.stamp"
