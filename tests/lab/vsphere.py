#!/usr/bin/env python3
"""The rows of tests/bench --vsphere: exports from the double beside curl and nbdkit. See there for what is measured."""

import argparse
import json
import os
import pathlib
import random
import re
import shutil
import signal
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request

LAB = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(LAB))
from bench import collect  # noqa: E402
from rest import free_port, until  # noqa: E402

USER, PASSWORD = "backup@vsphere.local", "correct horse battery"
# The one has a snapshot, so that it goes by a lease; the other one goes by ranges.
LEASED, RANGED = "DC0_H0_VM0", "DC0_H0_VM1"
TRUSTING = ssl._create_unverified_context()


def make_disk(folder):
    """A 1 GiB ext4 disk with about 700 MiB of data: shared files, libraries, noise, zeros."""
    random.seed(7)
    tree = folder / "tree"
    for part, source, limit in (("share", "/usr/share", 270 << 20), ("lib", "/usr/lib", 280 << 20)):
        (tree / part).mkdir(parents=True)
        collect(source, str(tree / part), limit)
    with open(tree / "noise", "wb") as noise:
        for _ in range(110):
            noise.write(random.randbytes(1 << 20))
    (tree / "zeros").write_bytes(bytes(40 << 20))
    disk = folder / "disk.raw"
    subprocess.run(f"truncate -s 1G {disk} && mke2fs -q -t ext4 -d {tree} -L bench {disk} && (fallocate -d {disk} || true)", check=True,
                   shell=True, stdout=subprocess.DEVNULL)
    shutil.rmtree(tree)
    return disk


class Double:
    """The vCenter, with both VMs off and the disk in each."""

    def __init__(self, program, folder, disk, rate):
        self.host, self.cookie = f"127.0.0.1:{free_port()}", None
        work = folder / f"double-{rate}"
        work.mkdir()
        subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
                        "-subj", "/CN=double", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", work / "key.pem", "-out", work / "cert.pem"],
                       check=True, stderr=subprocess.DEVNULL)
        command = [program, "-l", self.host, "-u", USER, "-p", PASSWORD, "-off", f"{LEASED},{RANGED}", "-nfcrate", str(rate),
                   "-seed", f"{LEASED}={disk},{RANGED}={disk}", "-cert", work / "cert.pem", "-key", work / "key.pem"]
        log = open(work / "log", "w")
        self.process = subprocess.Popen(command, env={**os.environ, "TMPDIR": str(work)}, stdout=log, stderr=log)
        until("the double", 60, lambda: "listening" in (work / "log").read_text())
        content = self.call("ServiceInstance", "ServiceInstance", "RetrieveServiceContent")
        manager = re.search(r"<sessionManager[^>]*>([^<]+)<", content).group(1)
        self.call("SessionManager", manager, "Login", f"<userName>{USER}</userName><password>{PASSWORD}</password>")

    def call(self, kind, this, method, body=""):
        envelope = (f'<?xml version="1.0"?><Envelope xmlns="http://schemas.xmlsoap.org/soap/envelope/"><Body><{method} xmlns="urn:vim25">'
                    f'<_this type="{kind}">{this}</_this>{body}</{method}></Body></Envelope>')
        headers = {"Content-Type": "text/xml", **({"Cookie": self.cookie} if self.cookie else {})}
        request = urllib.request.Request(f"https://{self.host}/sdk", envelope.encode(), headers)
        with urllib.request.urlopen(request, context=TRUSTING, timeout=60) as answer:
            if set_cookie := answer.headers.get("Set-Cookie"):
                self.cookie = set_cookie.split(";")[0]
            return answer.read().decode()

    def lease(self, vm):
        """A lease of the VM, and its first disk's URL."""
        lease = re.search(r"<returnval[^>]*>([^<]+)<", self.call("VirtualMachine", vm, "ExportVm")).group(1)
        return lease, f"https://{self.host}/fakenfc/{lease}/disk-0.vmdk"

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        self.process.wait()


class Up:
    """`hypersdk up`, release build."""

    def __init__(self, hypersdk, folder):
        self.folder, self.token = folder / "up", None
        self.folder.mkdir()
        (self.folder / "vms").mkdir()
        port = free_port()
        self.base = f"https://127.0.0.1:{port}/api/v1"
        env = {"PATH": os.environ["PATH"], "HOME": str(self.folder), "HYPERSDK_ADMIN_PASSWORD": PASSWORD,
               "HYPERSDK_LIMITS_USER_PER_MINUTE": "10000000"}
        command = [hypersdk, "up", "--listen", f"127.0.0.1:{port}", "--data-dir", self.folder / "data", "--vms", self.folder / "vms"]
        log = open(self.folder / "log", "w")
        self.process = subprocess.Popen(command, env=env, stdout=log, stderr=log)
        until("hypersdk up", 60, lambda: self.ask("POST", "/auth/login", {"username": "admin", "password": PASSWORD}))
        self.token = self.ask("POST", "/auth/login", {"username": "admin", "password": PASSWORD})["token"]
        until("the agent inside", 30, lambda: any(row["status"] == "connected" for row in self.ask("GET", "/agents")["data"]))

    def ask(self, method, path, body=None):
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {self.token}"} if self.token else {})}
        request = urllib.request.Request(self.base + path, None if body is None else json.dumps(body).encode(), headers, method=method)
        try:
            with urllib.request.urlopen(request, context=TRUSTING, timeout=60) as answer:
                return json.loads(answer.read() or b"null")
        except urllib.error.HTTPError as e:
            raise RuntimeError(f"{method} {path}: {e.code} {e.read().decode()}") from None

    def export(self, provider, vm, form):
        """Seconds of the copy (the first byte asked for to the last one written), and of the whole job with its verification."""
        began = time.perf_counter()
        job = self.ask("POST", "/jobs", {"type": "export", "provider": provider, "vm_name": vm, "format": form})
        copying = copied = None
        while True:
            seen, now = self.ask("GET", f"/jobs/{job['id']}"), time.perf_counter()
            if copying is None and seen["stage"] not in ("queued", "waiting", "preparing"):
                copying = now
            if copied is None and seen["stage"] in ("verifying", "publishing", "completed"):
                copied = now
            if seen["status"] == "completed":
                break
            if seen["status"] in ("failed", "cancelled"):
                raise SystemExit(f"tests/bench: {json.dumps(seen, indent=1)}")
            time.sleep(0.01)
        whole = time.perf_counter() - began
        shutil.rmtree(pathlib.Path(seen["result"]["files"][0]["path"]).parent)
        return copied - copying, whole

    def stop(self):
        self.process.terminate()
        self.process.wait()


def row(name, rounds, rival, ours):
    """Runs both turn by turn; prints medians of ours/rival."""
    copies, wholes, last = [], [], None
    for turn in range(rounds + 1):
        theirs = rival()
        copy, whole = ours()
        if turn:  # The first round warms caches.
            copies.append(copy / theirs)
            wholes.append(whole / theirs)
            last = (theirs, copy, whole)
    print(f"| {name} | ×{statistics.median(copies):.2f} | ×{statistics.median(wholes):.2f} | {last[0]:.2f} s, {last[1]:.2f} s, {last[2]:.2f} s |",
          flush=True)


def timed(command):
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-n", type=int, default=5)
    parser.add_argument("--hypersdk", required=True)
    parser.add_argument("--double", required=True)
    parser.add_argument("parts", nargs="*")
    args = parser.parse_args()
    wanted = lambda part: not args.parts or part in args.parts
    with tempfile.TemporaryDirectory(prefix="hypersdk-bench-", dir="/dev/shm") as name:
        folder = pathlib.Path(name)
        disk, out = make_disk(folder), folder / "out"
        up = Up(os.path.abspath(args.hypersdk), folder)
        print(f"disk: 1024 MiB, {os.stat(disk).st_blocks >> 11} MiB of data")
        print("| what | copy: ours/rival | with verification | rival, copy, whole job in the last round |\n|---|---|---|---|", flush=True)
        rates = [("as fast as it gives", 0), ("100 MB/s", 100_000_000), ("30 MB/s", 30_000_000)]
        for said, rate in rates:
            if not wanted("nfc") and rate:
                continue
            double = Double(os.path.abspath(args.double), folder, disk, rate)
            provider = f"vc{rate}"
            up.ask("POST", "/providers/connect", {"provider": "vsphere", "name": provider, "host": double.host, "username": USER,
                                                  "password": PASSWORD, "insecure": True})
            ids = {vm["name"]: vm["id"] for vm in up.ask("GET", f"/vms/list?provider={provider}&limit=200")["data"]}
            double.call("VirtualMachine", ids[LEASED], "CreateSnapshot_Task", "<name>op</name><memory>false</memory><quiesce>false</quiesce>")
            # It must have been seen, or else the VM would go by ranges.
            until("the snapshot", 30, lambda: [vm for vm in up.ask("GET", f"/vms/list?provider={provider}&search={LEASED}")["data"]
                                               if vm["snapshots"] == 1])

            def curl():
                lease, url = double.lease(ids[LEASED])
                taken = timed(["curl", "-sS", "-k", "-f", "-b", double.cookie, "-o", out, url])
                double.call("HttpNfcLease", lease, "HttpNfcLeaseComplete")
                out.unlink()
                return taken

            if wanted("nfc"):
                row(f"lease → qcow2 beside curl, {said}", args.n, curl, lambda: up.export(provider, LEASED, "qcow2"))
            if wanted("folder") and not rate:
                store = next(line for line in (folder / "double-0/log").read_text().splitlines() if line.startswith("datastore")).split()[1]
                url = f"https://{double.host}/folder/{RANGED}/disk1-flat.vmdk?dcPath=DC0&dsName={store}"
                copies = [["--connections=8"], ["--connections=8", "--request-size=2097152", "--requests=8"]]

                def nbdcopy(more):
                    serve = ["nbdkit", "-U", "-", "--filter=multi-conn", "curl", f"url={url}", f"user={USER}", f"password={PASSWORD}",
                             "sslverify=false", "multi-conn-mode=unsafe", "--run", f"nbdcopy {' '.join(more)} \"$uri\" {out}"]
                    taken = timed(serve)
                    out.unlink()
                    return taken

                # The rival gets the better of its two settings.
                best = min(copies, key=lambda more: min(nbdcopy(more) for _ in range(2)))
                said = " ".join(best)
                row(f"/folder → raw beside nbdkit curl, nbdcopy {said}", args.n, lambda: nbdcopy(best), lambda: up.export(provider, RANGED, "raw"))
            up.ask("DELETE", f"/providers/{provider}")
            double.stop()
        up.stop()


if __name__ == "__main__":
    main()
