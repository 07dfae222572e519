#!/usr/bin/env python3
"""The rows of tests/bench-rest: a controller under load, beside what it is measured against. See there for what is measured."""

import argparse
import asyncio
import base64
import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import ssl
import statistics
import subprocess
import tempfile
import time
import urllib.error
import urllib.request

LAB = pathlib.Path(__file__).resolve().parent
PASSWORD = "correct horse battery"
JOB = {"type": "export", "provider": "local", "vm_name": "web", "format": "raw"}
ROWS = 100_000
TRUSTING = ssl._create_unverified_context()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def until(what, seconds, probe):
    """Waits for a condition; its last failure is the error's text."""
    end, last = time.monotonic() + seconds, None
    while time.monotonic() < end:
        try:
            answer = probe()
            if answer:
                return answer
            last = answer
        except Exception as e:  # whatever it was, it is told
            last = e
        time.sleep(0.05)
    raise SystemExit(f"waited {seconds} s for {what}: {last!r}")


class Postgres:
    """A server of its own with everything as it is installed: durable."""

    def __init__(self, folder):
        self.bin = sorted(pathlib.Path("/usr/lib/postgresql").glob("*/bin"))[-1]
        self.folder, self.port = folder, free_port()
        folder.mkdir()
        shutil.chown(folder, "postgres")
        self.user = ["setpriv", "--reuid", "postgres", "--regid", "postgres", "--clear-groups"]
        init = [f"{self.bin}/initdb", "--auth=trust", "--username=hypersdk", "--encoding=UTF8", "--locale=C", "-D", f"{folder}/data"]
        subprocess.run(self.user + init, check=True, stdout=subprocess.DEVNULL)
        serve = [f"{self.bin}/postgres", "-D", f"{folder}/data", "-k", str(folder), "-p", str(self.port), "-c", "listen_addresses=127.0.0.1"]
        with open(folder / "log", "w") as log:
            self.process = subprocess.Popen(self.user + serve, stdout=log, stderr=log)
        until("Postgres", 30, lambda: self.sql("CREATE DATABASE bench", "postgres"))
        self.url = f"postgres://hypersdk@127.0.0.1:{self.port}/bench"

    def sql(self, text, database="bench"):
        ask = ["psql", "-q", "-h", "127.0.0.1", "-p", str(self.port), "-U", "hypersdk", "-d", database, "-v", "ON_ERROR_STOP=1", "-c", text]
        subprocess.run(ask, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        return True

    def stop(self):
        self.process.send_signal(signal.SIGINT)
        self.process.wait()


class Controller:
    """The release build, alone: its agent has told of one VM and is gone."""

    def __init__(self, folder, binaries, url=None):
        self.folder, self.binaries, self.process = folder, binaries, None
        (folder / "vms").mkdir(parents=True)
        (folder / "exports").mkdir()
        with open(folder / "vms/web.raw", "wb") as image:
            image.write(b"x")
            image.truncate(1 << 20)
        self.port, self.grpc = free_port(), free_port()
        self.base = f"https://127.0.0.1:{self.port}"
        self.env = {
            "PATH": os.environ["PATH"],
            "HYPERSDK_LISTEN": f"127.0.0.1:{self.port}",
            "HYPERSDK_GRPC_LISTEN": f"127.0.0.1:{self.grpc}",
            "HYPERSDK_DATA_DIR": str(folder / "data"),
            "HYPERSDK_ADMIN_PASSWORD": PASSWORD,
            "HYPERSDK_LIMITS_ANONYMOUS_BURST": "10000000",
            "HYPERSDK_LIMITS_ANONYMOUS_REPLENISH_MS": "1",
            "HYPERSDK_LIMITS_USER_PER_MINUTE": "100000000",
            "HYPERSDK_LIMITS_LOGIN_FREE_TRIES": "1000000",
            "HYPERSDK_LIMITS_LOGIN_FREE_TRIES_ADDRESS": "1000000",
        }
        if url:
            self.env["HYPERSDK_DATABASE_URL"] = url
        self.start()
        join = self.ask("POST", "/agents/tokens", {})["token"]
        agent_env = {
            "PATH": os.environ["PATH"],
            "HYPERSDK_CONTROLLER": f"https://127.0.0.1:{self.grpc}",
            "HYPERSDK_TOKEN": join,
            "HYPERSDK_DATA_DIR": str(folder / "agent"),
            "HYPERSDK_AGENT_NAME": "bench",
            "HYPERSDK_EXPORTS_DIR": str(folder / "exports"),
            "HYPERSDK_LOCAL_ROOT": str(folder / "vms"),
        }
        with open(folder / "agent.log", "w") as log:
            agent = subprocess.Popen([binaries / "hypersdk-agent"], env=agent_env, stdout=log, stderr=log)
        until("the VM", 30, lambda: self.ask("GET", "/vms/list?refresh=true")["data"])
        agent.kill()
        agent.wait()

    def start(self):
        with open(self.folder / "log", "a") as log:
            self.process = subprocess.Popen([self.binaries / "hypersdk-controller"], env=self.env, stdout=log, stderr=log)
        self.token = None
        until("the controller", 60, lambda: self.ask("GET", "/livez"))
        self.token = self.ask("POST", "/auth/login", {"username": "admin", "password": PASSWORD})["token"]

    def stop(self):
        self.process.terminate()
        self.process.wait()

    def ask(self, method, path, body=None, raw=None):
        headers = {"Content-Type": "application/octet-stream" if raw is not None else "application/json"}
        if self.token:
            headers["Authorization"] = f"Bearer {self.token}"
        data = raw if raw is not None else None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.base + path, data, headers, method=method)
        with urllib.request.urlopen(request, context=TRUSTING, timeout=60) as answer:
            return json.load(answer)

    def memory(self, field="VmRSS"):
        """KiB."""
        status = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(rf"{field}:\s+(\d+)", status).group(1))


def wrk(url, token, connections=32, seconds=5, script=None):
    """Answers a second, and the 50th and 99th of a hundred, in milliseconds."""
    command = ["wrk", "-t2", f"-c{connections}", f"-d{seconds}s", "--latency", "-H", f"Authorization: Bearer {token}"]
    command += ["-s", str(script)] if script else []
    text = subprocess.run([*command, url], check=True, capture_output=True, text=True).stdout
    if refused := re.search(r"Non-2xx.*|Socket errors.*", text):
        print("  !", refused.group(0))
    units = {"us": 0.001, "ms": 1, "s": 1000}
    at = lambda percent: float((m := re.search(rf"{percent}%\s+([\d.]+)(us|ms|s)", text)).group(1)) * units[m.group(2)]
    return float(re.search(r"Requests/sec:\s+([\d.]+)", text).group(1)), at(50), at(99)


def script(folder, name, text):
    path = folder / name
    path.write_text(text)
    return path


def jobs(controller, kind):
    body = json.dumps(JOB)
    lua = f"wrk.method = 'POST'\nwrk.headers['Content-Type'] = 'application/json'\nwrk.body = '{body}'\n"
    rate, middle, late = wrk(controller.base + "/jobs", controller.token, script=script(controller.folder, "post.lua", lua))
    print(f"{kind}: POST /jobs, 32 connections: {rate:.0f}/s, p50 {middle:.1f} ms, p99 {late:.1f} ms", flush=True)


def seed(controller, postgres):
    """So many finished jobs in place of those that are there."""
    sql = (LAB / "seed.sql").read_text()
    controller.stop()
    if postgres:
        sql = sql.replace("CHAR10", "chr(10)").replace("ID AS", "lpad(to_hex(n), 16, '0') AS").replace("NAME AS", "lpad(n::text, 6, '0') AS")
        for line in ["DELETE FROM jobs", sql.replace("NUMBERS", f"(SELECT n FROM generate_series(1, {ROWS}) AS n) AS numbers"), "VACUUM ANALYZE"]:
            postgres.sql(line)
    else:
        numbers = f"(WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c WHERE n < {ROWS}) SELECT n FROM c)"
        sql = sql.replace("CHAR10", "char(10)").replace("ID AS", "printf('%016x', n) AS").replace("NAME AS", "printf('%06d', n) AS")
        database = controller.folder / "data/hypersdk.db"
        subprocess.run(["sqlite3", database, "DELETE FROM jobs;" + sql.replace("NUMBERS", numbers)], check=True)
    controller.start()


def lists(controller, kind, postgres, rounds):
    seed(controller, postgres)
    data = controller.folder / "data"
    port = free_port()
    env = {
        "DATABASE_URL": postgres.url if postgres else f"sqlite://{data}/hypersdk.db?mode=rw",
        "LISTEN": f"127.0.0.1:{port}",
        "TLS_CERT": str(data / "rest-cert.pem"),
        "TLS_KEY": str(data / "rest-key.pem"),
    }
    queries = {"plain": "", "status": "status=completed", "provider": "provider=vsphere&status=failed", "search": "search=vm-004242"}
    for name, query in queries.items():
        with open(controller.folder / "bare.log", "w") as log:
            bare = subprocess.Popen([controller.binaries / "examples/bare_list"], env={**env, "QUERY": name}, stdout=log, stderr=log)
        until("the bare handler", 20, lambda: socket.create_connection(("127.0.0.1", port), 1))
        pairs = []
        for _ in range(rounds):
            pairs.append((wrk(f"https://127.0.0.1:{port}/jobs", "none", seconds=3), wrk(f"{controller.base}/jobs?{query}", controller.token, seconds=3)))
        bare.kill()
        bare.wait()
        ratio = statistics.median(ours[0] / theirs[0] for theirs, ours in pairs)
        theirs, ours = sorted(pairs, key=lambda pair: pair[1][0])[len(pairs) // 2]
        print(
            f"{kind}: GET /jobs?{query} of {ROWS}: ×{ratio:.2f} of the bare handler "
            f"({ours[0]:.0f}/s, p99 {ours[2]:.1f} ms; bare {theirs[0]:.0f}/s, p99 {theirs[2]:.1f} ms)",
            flush=True,
        )
    more = ["search=vm-0", "search=42", "sort=vm_name", "status=completed&sort=updated_at&order=desc"]
    more += ["provider=dc1&status=failed&search=vm-01&sort=vm_name", "limit=50&offset=50000"]
    for query in more:
        rate, _, late = wrk(f"{controller.base}/jobs?{query}", controller.token, seconds=3)
        print(f"{kind}: GET /jobs?{query}: {rate:.0f}/s, p99 {late:.1f} ms", flush=True)
    lua = "local n = 0\nrequest = function() n = n + 1; return wrk.format('GET', '/jobs?search=vm-' .. string.format('%06d', (n * 7919) % 100000)) end\n"
    rate, _, late = wrk(controller.base, controller.token, seconds=5, script=script(controller.folder, "words.lua", lua))
    print(f"{kind}: GET /jobs?search=, another name each time: {rate:.0f}/s, p99 {late:.1f} ms", flush=True)
    # The same by one client at a time: what a person at a page feels.
    rate, middle, late = wrk(f"{controller.base}/jobs?search=42", controller.token, connections=2, seconds=3)
    print(f"{kind}: GET /jobs?search=42, 2 connections: {rate:.0f}/s, p50 {middle:.1f} ms, p99 {late:.1f} ms", flush=True)


class Watcher:
    """A WebSocket client (RFC 6455) that notes when it heard of each job."""

    def __init__(self, controller):
        self.controller, self.heard, self.lagged = controller, {}, 0

    async def open(self):
        # A deaf client's buffers are small: what it does not take stays the server's.
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.controller.port, ssl=TRUSTING, limit=1 << 16)
        key = base64.b64encode(os.urandom(16)).decode()
        head = f"GET /ws HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n"
        self.writer.write(f"{head}Authorization: Bearer {self.controller.token}\r\n\r\n".encode())
        answer = await self.reader.readuntil(b"\r\n\r\n")
        if b" 101 " not in answer.split(b"\r\n")[0]:
            raise SystemExit(f"no WebSocket: {answer!r}")

    async def listen(self):
        while True:
            first, second = await self.reader.readexactly(2)
            length = second & 127
            if length == 126:
                length = int.from_bytes(await self.reader.readexactly(2), "big")
            elif length == 127:
                length = int.from_bytes(await self.reader.readexactly(8), "big")
            payload = await self.reader.readexactly(length) if length else b""
            kind = first & 15
            if kind == 9:
                self.writer.write(bytes([0x8A, 0x80 | len(payload)]) + bytes(4) + payload)
            elif kind == 1 and b'"job.created"' in payload:
                self.heard[json.loads(payload)["data"]["id"]] = time.monotonic()
            elif kind == 1 and b'"lagged"' in payload:
                self.lagged += 1
            elif kind == 8:
                return


async def watched(controller, clients, deaf_share=10):
    async def flood():
        await asyncio.gather(*(asyncio.to_thread(lambda: [controller.ask("POST", "/jobs", JOB) for _ in range(125)]) for _ in range(4)))

    # What 500 queued jobs take themselves.
    await flood()
    alone = controller.memory()
    await flood()
    before = controller.memory()
    alone = before - alone
    deaf, hearing, tasks = [], [], []
    for number in range(clients):
        watcher = Watcher(controller)
        await watcher.open()
        if number % deaf_share == 0:
            deaf.append(watcher)
        else:
            hearing.append(watcher)
            tasks.append(asyncio.create_task(watcher.listen()))
    idle = (controller.memory() - before) / clients
    sizes, waits = [], []
    for _ in range(6):
        await flood()
        for _ in range(5):
            await asyncio.sleep(1)
            start = time.monotonic()
            made = await asyncio.to_thread(controller.ask, "POST", "/jobs", JOB)
            end = time.monotonic() + 30
            while time.monotonic() < end and not all(made["id"] in watcher.heard for watcher in hearing):
                await asyncio.sleep(0.01)
            told = [watcher.heard[made["id"]] - start for watcher in hearing if made["id"] in watcher.heard]
            waits.append((max(told), len(hearing) - len(told)))
        sizes.append((controller.memory() - before) / clients)
    lost = sum(waits[i][1] for i in range(len(waits)))
    sizes_text = ", ".join(f"{size:.0f}" for size in sizes)
    print(
        f"{clients} watchers, {len(deaf)} deaf: the last of {len(hearing)} heard of a job after {statistics.median(w for w, _ in waits) * 1000:.0f} ms "
        f"(longest {max(w for w, _ in waits) * 1000:.0f} ms, {lost} not heard, {sum(w.lagged for w in hearing)} told to have lagged, "
        f"{sum(task.done() for task in tasks)} closed); {idle:.0f} KiB for each idle, {sizes_text} KiB after each flood "
        f"of 500 jobs (which take {alone} KiB in all when nobody watches)",
        flush=True,
    )
    for task in tasks:
        task.cancel()
    for watcher in deaf + hearing:
        watcher.writer.transport.abort()
    await asyncio.gather(*tasks, return_exceptions=True)


async def slow(controller, count):
    """So many connections that send a header a byte at a time, or a body; beside them honest requests."""
    quiet = wrk(f"{controller.base}/jobs?limit=5", controller.token, connections=4, seconds=4)
    gone = 0

    async def dawdle(number):
        nonlocal gone
        request = b"GET /jobs HTTP/1.1\r\nHost: x\r\n" if number % 2 else b"POST /auth/login HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 5000\r\n\r\n"
        request += b"X-Slow: aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"
        while True:
            # The server cuts it off: it comes again.
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection("127.0.0.1", controller.port, ssl=TRUSTING)
                try:
                    for byte in request:
                        writer.write(bytes([byte]))
                        await writer.drain()
                        await asyncio.sleep(1)
                finally:
                    writer.transport.abort()
            gone += 1

    tasks = [asyncio.create_task(dawdle(number)) for number in range(count)]
    await asyncio.sleep(10)
    honest = await asyncio.to_thread(wrk, f"{controller.base}/jobs?limit=5", controller.token, 4, 8)
    held = sum(entry.split()[3] == "01" and entry.split()[1].endswith(f":{controller.port:04X}") for entry in open("/proc/net/tcp"))
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    print(
        f"{count} slow sockets ({held} connections held when it was measured, {gone} were cut off and came again): honest p99 {honest[2]:.1f} ms at {honest[0]:.0f}/s; without them {quiet[2]:.1f} ms at {quiet[0]:.0f}/s",
        flush=True,
    )


def login(controller, tries):
    """How long a refusal takes, for names that are there and for names that are not, each once."""
    for number in range(tries):
        controller.ask("POST", "/users", {"username": f"known-{number}", "password": PASSWORD, "role": "viewer"})
    took = {"known": [], "unknown": []}
    for number in range(tries):
        for kind in took:
            start = time.monotonic()
            with contextlib.suppress(urllib.error.HTTPError):
                controller.ask("POST", "/auth/login", {"username": f"{kind}-{number}", "password": "a wrong password"})
                raise SystemExit("a wrong password logged in")
            took[kind].append(time.monotonic() - start)
    known, unknown = (statistics.median(took[kind]) for kind in took)
    print(f"login refused, medians of {tries}: name known {known * 1000:.1f} ms, unknown {unknown * 1000:.1f} ms ({(unknown / known - 1) * 100:+.1f} %)", flush=True)


def files(controller, folder, rounds):
    """1 GiB: of an upload by the controller, and the same by nginx with the same certificate."""
    size, step = 1 << 30, 10_000_000
    www = folder / "www"
    www.mkdir()
    source = www / "f.raw"
    with open(source, "wb") as out:
        for _ in range(size >> 20):
            out.write(os.urandom(1 << 20))
    upload = controller.ask("POST", "/upload/init", {"filename": "f.raw", "size": size})["upload_id"]
    with open(source, "rb") as image:
        for index in range(-(-size // step)):
            controller.ask("POST", f"/upload/chunk?upload_id={upload}&index={index}", raw=image.read(step))
    controller.token and controller.ask("POST", "/upload/complete", {"upload_id": upload})
    port = free_port()
    data = controller.folder / "data"
    (folder / "nginx.conf").write_text(
        f"daemon off; pid {folder}/nginx.pid; error_log {folder}/nginx.log; worker_processes auto; user root;\n"
        "events { worker_connections 64; }\n"
        f"http {{ access_log off; sendfile on; tcp_nopush on; server {{ listen 127.0.0.1:{port} ssl; ssl_certificate {data}/rest-cert.pem; "
        f"ssl_certificate_key {data}/rest-key.pem; ssl_protocols TLSv1.3; root {www}; }} }}\n"
    )
    nginx = subprocess.Popen(["nginx", "-c", folder / "nginx.conf", "-p", folder])
    until("nginx", 20, lambda: socket.create_connection(("127.0.0.1", port), 1))
    theirs, ours = f"https://127.0.0.1:{port}/f.raw", f"{controller.base}/download?path=uploads/{upload}/f.raw"

    def fetch(url, streams, version):
        start = time.monotonic()
        curl = ["curl", version, "-fsk", "-H", f"Authorization: Bearer {controller.token}", "-o", "/dev/null", url]
        running = [subprocess.Popen(curl) for _ in range(streams)]
        if any(process.wait() for process in running):
            raise SystemExit(f"curl could not fetch {url}")
        return streams * size / (time.monotonic() - start) / 1e6

    for url in [theirs, ours]:
        fetch(url, 1, "--http1.1")
    for streams in [1, 2]:
        pairs = [(fetch(theirs, streams, "--http1.1"), fetch(ours, streams, "--http1.1"), fetch(ours, streams, "--http2")) for _ in range(rounds)]
        first, second = statistics.median(b / a for a, b, _ in pairs), statistics.median(c / a for a, _, c in pairs)
        middle = [statistics.median(column) for column in zip(*pairs)]
        print(
            f"download of 1 GiB, {streams} stream(s): ×{first:.2f} of nginx ({middle[1]:.0f} to {middle[0]:.0f} MB/s); HTTP/2 ×{second:.2f} ({middle[2]:.0f} MB/s)",
            flush=True,
        )
    nginx.terminate()
    nginx.wait()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("-n", type=int, default=3, help="rounds")
    parser.add_argument("--binaries", type=pathlib.Path, required=True)
    parser.add_argument("parts", nargs="*", default=["jobs", "lists", "watchers", "slow", "login", "files"])
    args = parser.parse_args()
    folder = pathlib.Path(tempfile.mkdtemp(prefix="hypersdk-bench-"))
    folder.chmod(0o755)
    binaries = args.binaries.resolve()
    started = []
    try:
        for kind in ["SQLite", "Postgres"]:
            postgres = None
            if not {"jobs", "lists"} & set(args.parts) and kind == "Postgres":
                continue
            if kind == "Postgres":
                started.append(postgres := Postgres(folder / "postgres"))
            started.append(controller := Controller(folder / kind, binaries, postgres and postgres.url))
            if "jobs" in args.parts:
                jobs(controller, kind)
            if "lists" in args.parts:
                lists(controller, kind, postgres, args.n)
                print(f"{kind}: the controller had {controller.memory('VmHWM') >> 10} MiB at its peak", flush=True)
            if kind == "SQLite":
                if "watchers" in args.parts:
                    asyncio.run(watched(controller, 1000))
                if "slow" in args.parts:
                    asyncio.run(slow(controller, 1000))
                if "login" in args.parts:
                    login(controller, 200)
                if "files" in args.parts:
                    files(controller, folder, args.n)
            controller.stop()
    finally:
        for service in reversed(started):
            with contextlib.suppress(Exception):
                service.stop()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
