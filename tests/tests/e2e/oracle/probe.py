"""Asks the gateway for commands larger than OpenSSH's client sends, and prints what came of each as JSON.

probe.py HOST PORT USER KEY
"""

import json
import sys

results = {}
# Kept, so that their connections are.
clients = []


def beyond_the_limit(host, port, user, key):
    """sshd ends the connection when it gets one of them."""
    transport = connected(host, port, user, key)
    results["220 kB"] = run(transport, "true " + "x" * 220_000)
    results["after it"] = run(transport, "echo still here")
    results["1 MB"] = run(transport, "true " + "x" * 1_000_000)
    results["another connection"] = run(connected(host, port, user, key), "echo still here")


def run(transport, command):
    channel = session(transport)

    def work():
        channel.exec_command(command)
        return ended(channel)

    return tried(work)


def tried(work):
    """What work returns, or the kind of its failure."""
    import paramiko

    try:
        return work()
    except paramiko.ChannelException as error:
        return f"refused with code {error.code}"
    except (EOFError, OSError):
        return "the connection ended"
    except paramiko.SSHException as error:
        return f"{type(error).__name__}: {error}"


def ended(channel):
    """Everything a channel of paramiko's says until its end."""
    out = b"".join(iter(lambda: channel.recv(65536), b""))
    err = b"".join(iter(lambda: channel.recv_stderr(65536), b""))
    return [channel.recv_exit_status(), out.decode("latin1")[:2000], len(out), err.decode("latin1")[:2000]]


def session(transport):
    channel = transport.open_session(timeout=60)
    channel.settimeout(60)
    return channel


def connected(host, port, user, key):
    import paramiko

    client = paramiko.SSHClient()
    client.set_missing_host_key_policy(paramiko.AutoAddPolicy())
    client.connect(host, int(port), user, key_filename=key, allow_agent=False, look_for_keys=False, timeout=60)
    clients.append(client)
    return client.get_transport()


beyond_the_limit(*sys.argv[1:])
for client in clients:
    client.close()
json.dump(results, sys.stdout)
