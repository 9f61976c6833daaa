"""What slow readers of large messages cost each process: memory.py HOST:PORT BYTES LETTER PID...

Posts 128 MiB of messages of BYTES bytes, each byte LETTER (an escape such as \\x01 grows in JSON), and then has 64 GETs
and 64 followers, from the beginning and of what is new, read 8 KiB a second for 15 s each while 4 more are posted.
Prints each process's largest RssAnon in MiB, and how many readers were cut.
"""

import socket
import sys
import threading
import time
import urllib.request

ADDRESS, BYTES, LETTER, PIDS = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4:]
HOST, PORT = ADDRESS.split(":")
MESSAGE = LETTER.encode().decode("unicode_escape") * (BYTES - 8)
READING = 15


def post(count):
    for number in range(count):
        body = f"{number:8}{MESSAGE}".encode()
        request = urllib.request.Request(f"http://{ADDRESS}", body, {"content-type": "text/plain"})
        urllib.request.urlopen(request).read()


def anonymous(pid):
    with open(f"/proc/{pid}/status") as status:
        return next(int(line.split()[1]) // 1024 for line in status if line.startswith("RssAnon:"))


def read_slowly(target, accept, results):
    connection = socket.socket()
    # A small window, so that what is not read waits in the service.
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
    connection.settimeout(60)
    connection.connect((HOST, int(PORT)))
    connection.sendall(f"GET {target} HTTP/1.1\r\nhost: localhost\r\naccept: {accept}\r\n\r\n".encode())
    until = time.monotonic() + READING
    outcome = "no answer"
    try:
        outcome = connection.recv(12)[-3:].decode(errors="replace")
        while time.monotonic() < until:
            if not connection.recv(8192):
                outcome += " cut"
                break
            time.sleep(1)
    except OSError as error:
        outcome += f" {error}"
    connection.close()
    results[outcome] = results.get(outcome, 0) + 1


def run(name, readers):
    results, threads = {}, []
    for target, accept, count in readers:
        for _ in range(count):
            threads.append(threading.Thread(target=read_slowly, args=(target, accept, results)))
    for thread in threads:
        thread.start()
        time.sleep(0.02)
    peaks = [anonymous(pid) for pid in PIDS]
    posting = threading.Thread(target=post, args=(4,))
    posting.start()
    while any(thread.is_alive() for thread in threads):
        peaks = [max(peak, anonymous(pid)) for peak, pid in zip(peaks, PIDS)]
        time.sleep(0.05)
    posting.join()
    print(f"{name}: MiB {peaks}, readers {results}", flush=True)


def main():
    post(128 * (1 << 20) // BYTES)
    print(f"{BYTES} bytes of {LETTER}: idle MiB {[anonymous(pid) for pid in PIDS]}", flush=True)
    gets = [("/", "application/json", 22), ("/", "text/plain", 21), ("/?order=desc", "application/x-ndjson", 21)]
    followers = [("/", "text/event-stream", 32), ("/?follow=true", "text/plain", 16), ("/?follow=true&tail=0", "application/x-ndjson", 16)]
    searches = [("/?contains=1", "application/x-ndjson", 64)]
    run("64 readers", gets)
    run("64 followers", followers)
    run("64 readers, 64 followers", gets + followers)
    run("64 searches", searches)


main()
