"""The median time of an engine's own commit, in ms, by a program that does nothing else.

usage: commit.py lmdb FOLDER SECONDS, or commit.py redis|cluster PORT SECONDS

A commit on LMDB is an fsync of a written page. On Redis it is a write, which the server has on its disk before
it answers, and WAIT for one replica.
"""

import os
import socket
import statistics
import sys
import time


def fsync(file):
    os.pwrite(file, b"x" * 4096, 0)
    os.fdatasync(file)


def connect(port):
    connection = socket.create_connection(("127.0.0.1", port))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def ask(connection, commands, replies):
    connection.sendall(commands)
    received = b""
    while received.count(b"\r\n") < replies:
        received += connection.recv(4096)
    return received


def connect_to_owner(port):
    connection = connect(port)
    moved = ask(connection, b"INCR commit\r\n", 1).partition(b"MOVED")[2]
    return connect(int(moved.rpartition(b":")[2])) if moved else connection


def write_and_wait(connection):
    replies = ask(connection, b"INCR commit\r\nWAIT 1 1000\r\n", 2)
    if not replies.endswith(b"\r\n:1\r\n"):
        sys.exit(f"error: the server answered {replies!r}")


engine, place, seconds = sys.argv[1:]
if engine == "lmdb":
    subject = os.open(os.path.join(place, "commit"), os.O_RDWR | os.O_CREAT)
    commit = fsync
else:
    subject = connect_to_owner(int(place))
    commit = write_and_wait
times = []
end = time.perf_counter() + float(seconds)
while (begin := time.perf_counter()) < end:
    commit(subject)
    times.append(time.perf_counter() - begin)
print(f"{statistics.median(times) * 1000:.2f}")
