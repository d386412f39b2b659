"""An ADS server on gRPC's own stack (grpcio) and its own generated messages (xds-protos).

    control_plane.py DIRECTORY

Serves the resources in DIRECTORY (files of JSON: a list of messages with "@type") on a port of its own, in both variants of
the protocol, and prints one JSON object a line: {"port"}, {"subscribe", "names"}, {"ack" or "nack", "nonce", "error"}. A line on
standard input has the directory read again, and what changed sent.
"""

import hashlib
import json
import pathlib
import queue
import sys
import threading
from concurrent import futures

import grpc
from envoy.config.cluster.v3 import cluster_pb2
from envoy.config.endpoint.v3 import endpoint_pb2
from envoy.config.listener.v3 import listener_pb2
from envoy.config.route.v3 import route_pb2
from envoy.extensions.filters.http.router.v3 import router_pb2  # noqa: F401: known to the JSON parser
from envoy.extensions.filters.network.http_connection_manager.v3 import http_connection_manager_pb2  # noqa: F401
from envoy.service.discovery.v3 import ads_pb2_grpc, discovery_pb2
from envoy.service.runtime.v3 import rtds_pb2
from google.protobuf import any_pb2, json_format

NAMES = {
    cluster_pb2.Cluster: "name",
    endpoint_pb2.ClusterLoadAssignment: "cluster_name",
    listener_pb2.Listener: "name",
    route_pb2.RouteConfiguration: "name",
    rtds_pb2.Runtime: "name",
}


def say(**event):
    print(json.dumps(event), flush=True)


class World:
    """The resources: type URL -> name -> (version, Any)."""

    def __init__(self, directory):
        self.directory = pathlib.Path(directory)
        self.listeners = []
        self.types = {}
        self.read()

    def read(self):
        types = {}
        for path in sorted(self.directory.glob("*.json")):
            for item in json.loads(path.read_text()):
                packed = json_format.ParseDict(item, any_pb2.Any())
                for message_type, name_field in NAMES.items():
                    message = message_type()
                    if packed.Unpack(message):
                        version = hashlib.sha256(packed.value).hexdigest()[:8]
                        types.setdefault(packed.type_url, {})[getattr(message, name_field)] = (version, packed)
        self.types = types
        for listener in self.listeners:
            listener.put(None)

    def of(self, type_url):
        return self.types.get(type_url, {})

    def version(self, type_url):
        return hashlib.sha256(str(sorted((n, v) for n, (v, _) in self.of(type_url).items())).encode()).hexdigest()[:8]


class Subscription:
    def __init__(self):
        self.wildcard = False
        self.names = set()
        self.sent = {}
        self.version = None

    def wants(self, name):
        return self.wildcard or name in self.names


class Ads(ads_pb2_grpc.AggregatedDiscoveryServiceServicer):
    def __init__(self, world):
        self.world = world

    def _serve(self, requests, context, take, make):
        events = queue.Queue()
        self.world.listeners.append(events)

        def read():
            try:
                for request in requests:
                    events.put(request)
            except grpc.RpcError:
                pass
            events.put(StopIteration)

        threading.Thread(target=read, daemon=True).start()
        subscriptions, nonce = {}, 0
        while (event := events.get()) is not StopIteration:
            if event is not None:
                if event.response_nonce:
                    failed = event.HasField("error_detail")
                    say(**{"nack" if failed else "ack": event.type_url, "nonce": event.response_nonce,
                           "error": event.error_detail.message})
                take(subscriptions.setdefault(event.type_url, Subscription()), event)
            for type_url, subscription in subscriptions.items():
                response = make(type_url, subscription)
                if response is not None:
                    nonce += 1
                    response.nonce = str(nonce)
                    yield response
        self.world.listeners.remove(events)

    def StreamAggregatedResources(self, requests, context):
        def take(subscription, request):
            names = set(request.resource_names)
            if request.resource_names and names != subscription.names or not subscription.names and not names:
                say(subscribe=request.type_url, names=sorted(names))
            if names - subscription.names:
                subscription.version = None
            subscription.wildcard, subscription.names = not names, names

        def make(type_url, subscription):
            version = self.world.version(type_url)
            if subscription.version == version:
                return None
            subscription.version = version
            wanted = [body for name, (_, body) in self.world.of(type_url).items() if subscription.wants(name)]
            return discovery_pb2.DiscoveryResponse(type_url=type_url, version_info=version, resources=wanted)

        return self._serve(requests, context, take, make)

    def DeltaAggregatedResources(self, requests, context):
        def take(subscription, request):
            first = not subscription.names and not subscription.wildcard and not request.response_nonce
            if first:
                subscription.wildcard = not request.resource_names_subscribe
                subscription.sent = dict(request.initial_resource_versions)
                say(subscribe=request.type_url, names=sorted(request.resource_names_subscribe))
            for name in request.resource_names_unsubscribe:
                subscription.names.discard(name)
                subscription.sent.pop(name, None)
            for name in request.resource_names_subscribe:
                subscription.names.add(name)

        def make(type_url, subscription):
            resources = self.world.of(type_url)
            changed = {n: (v, body) for n, (v, body) in resources.items()
                       if subscription.wants(n) and subscription.sent.get(n) != v}
            removed = [n for n in subscription.sent if n not in resources]
            if not changed and not removed:
                return None
            response = discovery_pb2.DeltaDiscoveryResponse(type_url=type_url, removed_resources=removed)
            for name, (version, body) in changed.items():
                response.resources.add(name=name, version=version, resource=body)
                subscription.sent[name] = version
            for name in removed:
                del subscription.sent[name]
            return response

        return self._serve(requests, context, take, make)


def main():
    world = World(sys.argv[1])
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=8))
    ads_pb2_grpc.add_AggregatedDiscoveryServiceServicer_to_server(Ads(world), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    say(port=port)
    for _ in sys.stdin:
        world.read()
    server.stop(0)


main()
