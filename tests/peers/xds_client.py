"""A gRPC service, and a caller that finds it by gRPC's own xDS client.

    xds_client.py serve NAME            answers every call with NAME; prints {"port"}
    xds_client.py call TARGET           calls TARGET once for each line on standard input; prints {"answer"} or {"failed"}
    xds_client.py ask TARGET            the same, without waiting for a service that there is not

The caller's control plane is in GRPC_XDS_BOOTSTRAP_CONFIG.
"""

import json
import sys
from concurrent import futures

import grpc

METHOD = "/lab.Echo/Name"


def say(**event):
    print(json.dumps(event), flush=True)


def serve(name):
    handler = grpc.unary_unary_rpc_method_handler(lambda request, context: name.encode())
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=4))
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("lab.Echo", {"Name": handler})])
    port = server.add_insecure_port("0.0.0.0:0")
    server.start()
    say(port=port)
    server.wait_for_termination()


def call(target, timeout=5, wait=True):
    with grpc.insecure_channel(target) as channel:
        name = channel.unary_unary(METHOD)
        for _ in sys.stdin:
            try:
                say(answer=name(b"", timeout=timeout, wait_for_ready=wait).decode())
            except grpc.RpcError as error:
                say(failed=f"{error.code().name}: {error.details()}")


def ask(target):
    call(target, timeout=25, wait=False)


{"serve": serve, "call": call, "ask": ask}[sys.argv[1]](sys.argv[2])
