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
            /// Every reason, in numeric order.
            pub const ALL: [Self; Self::COUNT] = [$(Self::$variant),+];
            /// How many there are.
            pub const COUNT: usize = [$($number),+].len();

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
    6 PassedFragment "passed_fragment" "Fragments, which carry no ports to decide by.";
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
}
