"""Clients for hostile.sh.

hostile.py attack HOST:PORT: idle connections, slow posters, slow readers and slow uploads together; prints how
long each kind was served until it was cut, and ends when all are.
hostile.py behave HOST:PORT SECONDS: posts and reads from 127.0.0.2, one request at a time and 8 at once; prints
the requests, the failures, and the 99th percentile in milliseconds.
"""

import asyncio
import resource
import socket
import sys
import time

IDLE, POSTERS, READERS, UPLOADS = 10_000, 200, 64, 16
POST = b"POST / HTTP/1.1\r\nhost: localhost\r\n"
GET = b"GET / HTTP/1.1\r\nhost: localhost\r\n"
# As if they came from one client elsewhere: one on this machine may have all permits.
ELSEWHERE = b"x-forwarded-for: 192.0.2.1\r\n"


async def cut_after(host, port, request, crumb, pause):
    """Sends or reads a crumb at a time; the seconds until the connection or the answer ends it."""
    began = time.monotonic()
    try:
        reader, writer = await asyncio.open_connection(host, port, limit=4096)
        writer.write(request)
        while True:
            await asyncio.sleep(pause)
            if crumb:
                writer.write(crumb)
                await writer.drain()
                if reader.at_eof() or reader._buffer:
                    break
            elif not await reader.read(1):
                break
            # Neither an end nor a reset is seen while there is something to read.
            if reader._eof or writer.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                break
    except OSError:
        pass
    return time.monotonic() - began


async def hold_idle(host, port, until):
    try:
        reader, writer = await asyncio.open_connection(host, port, limit=4096)
        await asyncio.wait_for(reader.read(1), until - time.monotonic())
        writer.close()
    except (OSError, asyncio.TimeoutError):
        pass


async def attack(host, port):
    until = time.monotonic() + 60
    idle = []
    for number in range(IDLE):
        idle.append(asyncio.create_task(hold_idle(host, port, until)))
        if number % 200 == 0:
            await asyncio.sleep(0.05)
    ndjson = b"content-type: application/x-ndjson\r\n"
    chunked = b"transfer-encoding: chunked\r\n\r\n"
    kinds = {
        "posters": (POSTERS, POST + ELSEWHERE + chunked, b"1\r\nx\r\n", 3),
        "readers": (READERS, GET + ELSEWHERE + b"\r\n", None, 5),
        "uploads": (UPLOADS, POST + ELSEWHERE + ndjson + chunked, b"1\r\n \r\n", 3),
    }

    async def all_of(name, count, *what):
        times = await asyncio.gather(*(cut_after(host, port, *what) for _ in range(count)))
        print(f"{count} slow {name}: the last one was cut after {max(times):.0f} s", flush=True)

    await asyncio.gather(*(all_of(name, *kind) for name, kind in kinds.items()))
    await asyncio.gather(*idle)


async def behave(host, port, seconds):
    end = time.monotonic() + seconds
    times, failures = [], 0
    requests = [
        POST + b"content-length: 5\r\n\r\nhello",
        b"GET /?order=desc&limit=10 HTTP/1.1\r\nhost: localhost\r\naccept: application/x-ndjson\r\n\r\n",
    ]

    async def ask(reader, writer, request):
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        if b"content-length" in head:
            await reader.readexactly(int(head.split(b"content-length: ")[1].split(b"\r\n")[0]))
        else:
            await reader.readuntil(b"\r\n0\r\n\r\n")
        return head.startswith(b"HTTP/1.1 200")

    async def own_connection():
        own = ("127.0.0.2", 0)
        return await asyncio.open_connection(host, port, local_addr=own, limit=1 << 22)

    async def client():
        nonlocal failures
        reader, writer = await own_connection()
        while time.monotonic() < end:
            for request in requests:
                began = time.monotonic()
                try:
                    failures += not await ask(reader, writer, request)
                except (OSError, asyncio.IncompleteReadError):
                    failures += 1
                    reader, writer = await own_connection()
                times.append(time.monotonic() - began)

    await asyncio.gather(*(client() for _ in range(8)))
    times.sort()
    print(len(times), failures, f"{times[len(times) * 99 // 100] * 1000:.1f}")


def main():
    _, limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    host, port = sys.argv[2].rsplit(":", 1)
    if sys.argv[1] == "attack":
        asyncio.run(attack(host, int(port)))
    else:
        asyncio.run(behave(host, int(port), float(sys.argv[3])))


main()
