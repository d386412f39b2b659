//! The numbered reasons that the kernel programs count.

/// Defines [`Reason`] from one table: number, variant, name, meaning.
macro_rules! reasons {
    ($($number:literal $variant:ident $name:literal $meaning:literal;)+) => {
        /// Why a packet, connection or message went the way it went: an index of the map `COUNTERS`.
        ///
        /// Numbers are stable: dashboards and `bpftool map dump` readers rely on them. A reason that goes out of use
        /// leaves a gap in meaning, never in numbering.
        #[repr(u32)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Reason {
            $(#[doc = $meaning] $variant = $number,)+
        }

        impl Reason {
            /// Every reason, in numeric order. There are gaps between the numbers of the programs' families.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];
            /// One more than the greatest number.
            pub const COUNT: usize = Self::ALL[Self::ALL.len() - 1] as usize + 1;
            /// How many slots the map `COUNTERS` has: numbers below this may be given out without changing the map.
            pub const SLOTS: usize = 128;

            /// The counter's name in stats.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => concat!("interception.", $name),)+
                }
            }
        }
    };
}

reasons! {
    0 Redirected "redirected" "New connections given to a worker's listener.";
    1 Steered "steered" "Packets given to one of the daemon's existing sockets.";
    2 PassedNotEnrolled "passed_not_enrolled" "New connections of addresses that are not enrolled.";
    3 PassedExcludedPort "passed_excluded_port" "New connections to an excluded port.";
    4 PassedExcludedRange "passed_excluded_range" "New connections to an excluded range.";
    5 PassedLocal "passed_local" "New connections to one of the node's own addresses.";
    6 PassedFragment "passed_fragment" "Fragments of TCP that are of none of the daemon's connections, as far as can be seen.";
    7 PassedExtensionHeader "passed_extension_header" "IPv6 packets with an extension header before TCP.";
    8 PassedTruncated "passed_truncated" "Packets too short for the headers that they announce.";
    9 FailedOpen "failed_open" "New connections that passed untouched because no worker listens.";
    10 FailedClosed "failed_closed" "New connections that were dropped because no worker listens.";
    11 AssignFailed "assign_failed" "Packets that the kernel refused to give to the chosen socket.";
    12 ListenerMissing "listener_missing" "New connections whose first choice of worker does not listen.";
    13 SocketRegistered "shortcut.sockets" "Sockets registered for the short cut.";
    14 SocketNotRegistered "shortcut.sockets_refused" "Sockets that could not be registered: a map is full, or another sockmap user was first.";
    15 ShortcutMessages "shortcut.messages" "Messages that took the short cut.";
    16 ShortcutBytes "shortcut.bytes" "Bytes that took the short cut.";
    17 ShortcutTcpMessages "shortcut.tcp_messages" "Messages that registered sockets sent by TCP.";
    18 ShortcutTcpBytes "shortcut.tcp_bytes" "Bytes of same-node hops that went by TCP; of hops that could not be registered, counted when they close.";
    19 ShortcutPeerMissing "shortcut.peer_missing" "Messages sent by TCP because the peer was not registered, or no longer.";
    20 ShortcutTcpUnread "shortcut.tcp_unread" "Messages sent by TCP because bytes sent by TCP before were unread.";
    21 ShortcutReceiverBehind "shortcut.receiver_behind" "Changes to TCP because the receiver had a full window to read.";
    22 ShortcutResumed "shortcut.resumed" "Changes from TCP to the short cut, after the receiver had read everything.";
    23 ShortcutBlocking "shortcut.blocking" "Pods' connections not registered because the program's reads wait inside the kernel.";
    24 Reopened "reopened" "New connections with the addresses and ports of one that the daemon closed a short time ago.";
    25 RedirectedInbound "redirected_inbound" "New connections to pods given to a worker's inbound listener.";
    26 PassedExcludedUid "passed_excluded_uid" "New connections of programs whose user is excluded.";
    27 PassedVlan "passed_vlan" "Packets with a VLAN tag, which belong to another interface.";
    28 IcmpSteered "icmp_steered" "ICMP errors about the daemon's connections, given to this host.";
    29 ResetFailed "reset_failed" "Failed-closed connections that were dropped because no reset could be made for them.";
    30 OtherInterface "other_interface" "New connections from an enrolled pod's address that came over another pod's interface.";
    31 ShortcutSocketsOff "shortcut.sockets_off" "Sockets not registered because their pod, their listener or the run-time switch has the short cut off.";
    32 ShortcutOff "shortcut.switched_off" "Messages of registered sockets that went by TCP because the short cut was switched off.";
    33 JoinedMessages "joined.messages" "Messages that went from pod to pod past the daemon.";
    34 JoinedBytes "joined.bytes" "Bytes that went from pod to pod past the daemon.";
    35 JoinedNotForwarded "joined.not_forwarded" "Messages of joined connections given to the daemon because it had not forwarded all before them.";
    36 JoinedUnread "joined.unread" "Messages of joined connections given to the daemon because the receiver had not read all that came by TCP.";
    37 JoinedReceiverBehind "joined.receiver_behind" "Messages of joined connections given to the daemon because the receiver had a full window to read.";
    38 JoinedReceiverWaits "joined.receiver_waits" "Messages of joined connections given to the daemon because the receiver's program may wait inside TCP for the rest of what came before.";
    39 JoinedPeerMissing "joined.peer_missing" "Messages of joined connections given to the daemon because the receiver was not registered, or no longer.";
    40 JoinedConnections "joined.connections" "Connections whose pods were joined.";
    41 JoinRefusedOff "joined.refused_off" "Connections not joined because a pod, their listener or the run-time switch does not have it on.";
    42 JoinRefusedClient "joined.refused_client" "Connections not joined because the client's socket is not registered: not on this node, not in the cgroup, or its program waits inside the kernel.";
    43 JoinRefusedServer "joined.refused_server" "Connections not joined because the daemon's connection to the server is not registered: not to an enrolled pod of this node, or not in a pod's name.";
    44 JoinRefusedNoMemory "joined.refused_no_memory" "Connections not joined because a map is full.";
    45 JoinGivenUp "joined.given_up" "Directions of joined connections that were left to the daemon for good because nothing went past it.";
    46 PassedEnding "passed_ending" "New connections that passed untouched because the daemon is about to end.";
    50 HostRedirected "host.redirected" "Connections of host processes that were sent to a worker's listener.";
    51 HostPassedNamespace "host.passed_namespace" "Connections of processes of the configured cgroups that are in another network namespace than the node's.";
    52 HostPassedExcluded "host.passed_excluded" "Connections of host processes to an excluded port or range, or to the host itself.";
    53 HostFailedOpen "host.failed_open" "Connections of host processes that passed untouched because no worker listens.";
    54 HostFailedClosed "host.failed_closed" "Connections of host processes that were refused because no worker listens.";
    55 HostFlowNotKept "host.flow_not_kept" "Connections of host processes whose destination could not be kept for the daemon.";
    56 HostNoMemory "host.no_memory" "Connections of host processes that were refused because the kernel had no memory to remember their destination.";
    60 PassedBalanced "passed_balanced" "Pods' new connections that the kernel led to a backend of a service.";
    61 BalancedConnections "balanced.connections" "TCP connections that were given a backend.";
    62 BalancedSockets "balanced.udp_sockets" "UDP sockets that were connected to a service, and given a backend.";
    63 BalancedDatagrams "balanced.datagrams" "Datagrams to services that were given a backend, of sockets that are not connected.";
    64 BalancedReplies "balanced.replies" "Datagrams of backends that were shown as the service's.";
    65 BalancedMoved "balanced.moved" "UDP sockets whose next datagram got another backend because theirs was gone.";
    66 BalancedNoBackend "balanced.no_backend" "Connections and datagrams refused because the service has no backend.";
    67 BalancedNotKept "balanced.not_kept" "UDP sockets connected to a service that cannot be told when their backend is gone: the map is full.";
    68 BalancedNoMemory "balanced.no_memory" "Connections and datagrams refused because the kernel had no memory to remember the service.";
}
