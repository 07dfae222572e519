#!/bin/bash
# Boots a machine under QEMU until its serial console shows a marker, then switches it off.
#
#   boot-until.sh LOG MARKER SECONDS qemu-arguments…
#
# Exit 0 when the marker was seen; 1 when QEMU ended first (its messages follow) or SECONDS passed. LOG is the serial console.
# Acceleration is the caller's: tests force TCG (`-accel tcg,thread=multi`), because a KVM device that opens may still run no guest.
set -euo pipefail
[ $# -ge 3 ] || { echo "usage: boot-until.sh LOG MARKER SECONDS qemu-arguments…" >&2; exit 2; }
LOG=$1 MARKER=$2 LIMIT=$3
shift 3
: > "$LOG"
START=$SECONDS
RC=1
setpriv --pdeathsig KILL -- qemu-system-x86_64 -display none -nodefaults -no-reboot -serial "file:$LOG" "$@" 2> "$LOG.err" &
QEMU=$!
trap 'kill "$QEMU" 2>/dev/null || true' EXIT
while [ $((SECONDS - START)) -lt "$LIMIT" ]; do
  if grep -aq -- "$MARKER" "$LOG"; then RC=0; break; fi
  kill -0 "$QEMU" 2> /dev/null || break
  sleep 0.1
done
# What came out in the last tenth of a second counts, too.
if grep -aq -- "$MARKER" "$LOG"; then RC=0; fi
kill "$QEMU" 2> /dev/null || true
wait "$QEMU" 2> /dev/null || true
[ "$RC" = 0 ] || { echo "no \"$MARKER\" within $((SECONDS - START)) s; QEMU said:" >&2; cat "$LOG.err" >&2; tail -n 20 "$LOG" >&2; }
exit "$RC"
