#!/usr/bin/env python3
"""The pairs of tests/bench: makes the disk, runs rival and ours turn by turn, prints the table. See tests/bench for what is measured."""

import argparse
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

STREAM = "-O vmdk -o subformat=streamOptimized"
DEFLATE = "-O qcow2 -c"
ZSTD = "-O qcow2 -c -o compression_type=zstd"
# Name, the rival's options and input, ours, what the output is called.
PAIRS = [
    ("streamOptimized → raw", "-O raw", "stream.vmdk", "", "raw"),
    ("streamOptimized → qcow2", "-O qcow2", "stream.vmdk", "", "qcow2"),
    ("raw → streamOptimized, level 6", STREAM, "disk.raw", "--level 6", "vmdk"),
    # libdeflate's level 4 makes what qemu-img makes with zlib's level 6, within half a per cent.
    ("raw → streamOptimized, level 4", STREAM, "disk.raw", "--level 4", "vmdk"),
    ("raw → streamOptimized, level 1", STREAM, "disk.raw", "--level 1", "vmdk"),
    ("raw → streamOptimized, fast", STREAM, "disk.raw", "", "vmdk"),
    # With the whole window level 1 makes what qemu-img makes at its level in 4 KiB of window.
    ("raw → qcow2 zlib, same size", DEFLATE, "disk.raw", "--compression deflate --level 1", "qcow2"),
    ("raw → qcow2 zlib, level 6", DEFLATE, "disk.raw", "--compression deflate --level 6", "qcow2"),
    ("raw → qcow2 zlib, fast", DEFLATE, "disk.raw", "--compression deflate", "qcow2"),
    ("raw → qcow2 zstd, level 3", ZSTD, "disk.raw", "--compression zstd --level 3", "qcow2"),
    ("raw → qcow2 zstd, fast", ZSTD, "disk.raw", "--compression zstd", "qcow2"),
    ("streamOptimized → streamOptimized", STREAM, "stream.vmdk", "", "vmdk"),
    ("streamOptimized → OVA", STREAM, "stream.vmdk", "--format ova", "vmdk"),
    ("streamOptimized → qcow2 zlib", DEFLATE, "stream.vmdk", "--compression deflate", "qcow2"),
    ("streamOptimized → qcow2 zstd, level 3", ZSTD, "stream.vmdk", "--compression zstd --level 3", "qcow2"),
    ("monolithicSparse → qcow2", "-O qcow2", "sparse.vmdk", "", "qcow2"),
    ("raw → qcow2", "-O qcow2", "disk.raw", "", "qcow2"),
    ("qcow2 → raw", "-O raw", "plain.qcow2", "", "raw"),
]


def collect(source, target, limit):
    """Copies up to `limit` bytes of ordinary files below `source`."""
    found = []
    for folder, _, names in os.walk(source):
        for name in names:
            path = os.path.join(folder, name)
            if os.path.isfile(path) and not os.path.islink(path) and 0 < os.path.getsize(path) < 30 << 20:
                found.append(path)
    found.sort()
    random.shuffle(found)
    total = 0
    for path in found:
        size = os.path.getsize(path)
        if total + size <= limit:
            copy = os.path.join(target, os.path.relpath(path, source))
            os.makedirs(os.path.dirname(copy), exist_ok=True)
            shutil.copyfile(path, copy)
            total += size


def make_disks(folder):
    """A 2 GiB ext4 disk, about 37 % of it data: shared files, libraries, 110 MiB of noise, 40 MiB of zeros; and its other forms."""
    random.seed(7)
    tree = os.path.join(folder, "tree")
    for part in ("share", "lib", "noise", "zero"):
        os.makedirs(os.path.join(tree, part))
    collect("/usr/share", os.path.join(tree, "share"), 270 << 20)
    collect("/usr/lib", os.path.join(tree, "lib"), 260 << 20)
    with open(os.path.join(tree, "noise", "a"), "wb") as noise:
        for _ in range(110):
            noise.write(random.randbytes(1 << 20))
    with open(os.path.join(tree, "zero", "z"), "wb") as zeros:
        zeros.write(bytes(40 << 20))
    run = lambda command: subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL, shell=True)
    run("truncate -s 2G disk.raw && mke2fs -q -t ext4 -d tree -L bench disk.raw && (fallocate -d disk.raw || true)")
    shutil.rmtree(tree)
    run(f"qemu-img convert {STREAM} disk.raw stream.vmdk")
    run("qemu-img convert -O vmdk disk.raw sparse.vmdk")
    run("qemu-img convert -O qcow2 disk.raw plain.qcow2")


def timed(command, folder):
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, cwd=folder, shell=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(f"tests/bench: {command}: {done.stderr.strip()}")
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def allocated(path):
    return os.stat(path).st_blocks * 512


def clear(folder):
    for name in os.listdir(folder):
        if name.startswith("out."):
            os.unlink(os.path.join(folder, name))


def measure(pair, folder, hypersdk, rounds):
    name, options, source, flags, extension = pair
    ours_extension = "ova" if "ova" in flags else extension
    rivals = [f"qemu-img convert {more} {options} {source} out.{extension}" for more in ("", "-m 16 -W")]
    ours = f"{hypersdk} convert -q {source} out.{ours_extension} {flags}"
    walls, cpus, sizes = [], [], []
    for turn in range(rounds + 1):
        runs = []
        for rival in rivals:
            clear(folder)
            runs.append((timed(rival, folder), rival))
            rival_size = allocated(os.path.join(folder, f"out.{extension}"))
        best, winner = min(runs)
        if turn == 0 and max(runs)[0][0] > 1.2 * best[0]:
            rivals = [winner]  # Not close: the other one is left out from here on.
        clear(folder)
        taken = timed(ours, folder)
        if turn == 0:  # The first round warms caches.
            continue
        walls.append(best[0] / taken[0])
        cpus.append(best[1] / taken[1])
        sizes.append(allocated(os.path.join(folder, f"out.{ours_extension}")) / rival_size)
        last = (best[0], taken[0])
    clear(folder)
    wall, cpu, size = (statistics.median(values) for values in (walls, cpus, sizes))
    print(f"| {name} | ×{wall:.2f} | ×{cpu:.2f} | {100 * (size - 1):+.1f} % | {last[0]:.2f} s, {last[1]:.2f} s |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-n", type=int, default=5)
    parser.add_argument("--hypersdk", required=True)
    parser.add_argument("filter", nargs="?", default="")
    args = parser.parse_args()
    hypersdk = os.path.abspath(args.hypersdk)
    with tempfile.TemporaryDirectory(prefix="hypersdk-bench-", dir="/dev/shm") as folder:
        make_disks(folder)
        print("| pair | wall | CPU | size | rival, ours in the last round |\n|---|---|---|---|---|", flush=True)
        for pair in PAIRS:
            if args.filter in pair[0]:
                measure(pair, folder, hypersdk, args.n)
        one = f"{hypersdk} convert -q disk.raw out.raw"
        clear(folder)
        timed(one, folder)
        data = allocated(os.path.join(folder, "out.raw"))
        clear(folder)
        plain = statistics.median(timed(one, folder)[0] for _ in range(args.n) if not clear(folder))
        clear(folder)
        proven = statistics.median(timed(one + " --verify", folder)[0] for _ in range(args.n) if not clear(folder))
        clear(folder)
        if not args.filter:
            print(f"\nRead-back of {data / 1e6:.0f} MB of plain data: {data / 1e9 / max(proven - plain, 1e-3):.1f} GB/s ({proven - plain:.2f} s more with --verify)")


if __name__ == "__main__":
    main()
