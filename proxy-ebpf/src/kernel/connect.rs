//! What the programs at connect(), sendto(), recvfrom() and getpeername() have in common: addresses in their context,
//! what is kept with a socket, and whose call it is.

use core::ffi::c_void;
use core::ptr::read_volatile;

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::{BPF_SK_STORAGE_GET_F_CREATE, bpf_sock, bpf_sock_addr};
use aya_ebpf::btf_maps::{Array, SkStorage};
use aya_ebpf::helpers::{bpf_get_current_pid_tgid, bpf_set_retval, bpf_sk_storage_delete, bpf_sk_storage_get};
use aya_ebpf::macros::btf_map;
use aya_ebpf::programs::SockAddrContext;
use culvert_proxy_ebpf::{Address, Detour, Endpoint, TCP, UDP, from_words, v4_mapped};

/// The call goes on.
pub const ALLOW: i32 = 1;
/// The call fails.
const REFUSE: i32 = 0;

const SOCK_STREAM: u32 = 1;
const SOCK_DGRAM: u32 = 2;
const ECONNREFUSED: i32 = 111;

/// What each connected socket was led to.
#[btf_map]
static DETOURS: SkStorage<Detour> = SkStorage::new();

/// The daemon's process, as the first PID namespace numbers it; 0: unknown.
#[btf_map]
static DAEMON: Array<u32, 1> = Array::new();

/// 1: the kernel lets these programs choose the error of a refused call (from 6.1 on). The daemon sets it at load time.
#[unsafe(no_mangle)]
static CHOOSES_ERRORS: u32 = 0;

/// Notes the process that runs this: called by the daemon itself. Only the kernel knows the number that its programs
/// see: the daemon may be in a PID namespace of its own.
#[inline(always)]
pub fn note_daemon() {
    let _ = DAEMON.set(0, process(), 0);
}

/// The calling process.
#[inline(always)]
pub fn process() -> u32 {
    (bpf_get_current_pid_tgid() >> 32) as u32
}

/// The calling thread.
#[inline(always)]
pub fn thread() -> u32 {
    bpf_get_current_pid_tgid() as u32
}

/// Whether the daemon itself calls: its own connections go where it says.
#[inline(always)]
pub fn is_daemon() -> bool {
    DAEMON.get_ptr(0).is_some_and(|daemon| {
        // SAFETY: a value of an array map, which lives until the end of the program run.
        let daemon = unsafe { read_volatile(daemon) };
        daemon != 0 && daemon == process()
    })
}

/// Lets the call fail: with "connection refused", where the kernel lets the program say so.
#[inline(always)]
pub fn refuse() -> i32 {
    // SAFETY: a static of this object; volatile because the loader changes it after compilation.
    if unsafe { read_volatile(&raw const CHOOSES_ERRORS) } != 0 {
        // SAFETY: takes a number.
        unsafe { bpf_set_retval(-ECONNREFUSED) };
    }
    REFUSE
}

/// What the call names: the destination, or for recvfrom() the source. `None`: neither TCP nor UDP.
#[inline(always)]
pub fn named<const V6: bool>(ctx: &SockAddrContext) -> Option<Endpoint> {
    let call = ctx.sock_addr;
    // SAFETY: fields of the context that the kernel passed in; volatile, so that no offset into it is computed, which the
    // verifier refuses.
    let (kind, protocol, port) = unsafe {
        (
            read_volatile(&raw const (*call).type_),
            read_volatile(&raw const (*call).protocol),
            read_volatile(&raw const (*call).user_port),
        )
    };
    let protocol = match (kind, protocol as u8) {
        (SOCK_STREAM, TCP) if protocol == u32::from(TCP) => TCP,
        (SOCK_DGRAM, UDP) => UDP,
        _ => return None,
    };
    Some(Endpoint::new(address::<V6>(call), u16::from_be(port as u16), protocol))
}

#[inline(always)]
fn address<const V6: bool>(call: *const bpf_sock_addr) -> Address {
    // SAFETY: as in `named`; programs of either family may read their family's fields.
    unsafe {
        if V6 {
            from_words([
                read_volatile(&raw const (*call).user_ip6[0]),
                read_volatile(&raw const (*call).user_ip6[1]),
                read_volatile(&raw const (*call).user_ip6[2]),
                read_volatile(&raw const (*call).user_ip6[3]),
            ])
        } else {
            v4_mapped(read_volatile(&raw const (*call).user_ip4).to_ne_bytes())
        }
    }
}

/// Makes the call name something else. For IPv4 calls, `to` is an IPv4 address.
#[inline(always)]
pub fn rename<const V6: bool>(ctx: &SockAddrContext, to: &Endpoint) {
    let call = ctx.sock_addr;
    let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = to.address;
    // SAFETY: fields that programs of this family may write; volatile for the reason above.
    unsafe {
        if V6 {
            (&raw mut (*call).user_ip6[0]).write_volatile(u32::from_ne_bytes([a, b, c, d]));
            (&raw mut (*call).user_ip6[1]).write_volatile(u32::from_ne_bytes([e, f, g, h]));
            (&raw mut (*call).user_ip6[2]).write_volatile(u32::from_ne_bytes([i, j, k, l]));
            (&raw mut (*call).user_ip6[3]).write_volatile(u32::from_ne_bytes([m, n, o, p]));
        } else {
            (&raw mut (*call).user_ip4).write_volatile(u32::from_ne_bytes([m, n, o, p]));
        }
        (&raw mut (*call).user_port).write_volatile(u32::from(to.port.to_be()));
    }
}

/// The socket of the call.
#[inline(always)]
pub fn socket(ctx: &SockAddrContext) -> *mut bpf_sock {
    // SAFETY: a field of the context that the kernel passed in.
    unsafe { (*ctx.sock_addr).__bindgen_anon_1.sk }
}

/// Whether an address is IPv4 in its mapped form.
#[inline(always)]
pub fn is_v4(address: &Address) -> bool {
    let [a, b, c, d, e, f, g, h, i, j, k, l, ..] = *address;
    u64::from_ne_bytes([a, b, c, d, e, f, g, h]) == 0 && u32::from_be_bytes([i, j, k, l]) == 0xffff
}

/// What is kept with a connected socket.
#[inline(always)]
pub fn detour_of(sock: *mut bpf_sock) -> Option<&'static Detour> {
    kept((&raw const DETOURS).cast_mut().cast(), sock)
}

/// What a socket storage map keeps with a socket.
#[inline(always)]
pub fn kept(map: *mut c_void, sock: *mut bpf_sock) -> Option<&'static Detour> {
    if sock.is_null() {
        return None;
    }
    // SAFETY: a socket storage map and a socket from the context. What it returns lives as long as the program runs.
    unsafe { bpf_sk_storage_get(map, sock.cast(), core::ptr::null_mut(), 0).cast::<Detour>().as_ref() }
}

/// Keeps something with a socket; `false`: there is no memory.
#[inline(always)]
pub fn keep(map: *mut c_void, sock: *mut bpf_sock, detour: &mut Detour) -> bool {
    if sock.is_null() {
        return false;
    }
    let value = core::ptr::from_mut(detour);
    // SAFETY: a socket storage map, a socket from the context, and a value of the map's type.
    let stored = unsafe {
        bpf_sk_storage_get(map, sock.cast(), value.cast(), u64::from(BPF_SK_STORAGE_GET_F_CREATE)).cast::<Detour>()
    };
    if stored.is_null() {
        return false;
    }
    // SAFETY: not null: the socket's own storage. One that was there before still has the old value.
    unsafe { *stored = *detour };
    true
}

/// Keeps what a connecting socket is led to.
#[inline(always)]
pub fn keep_detour(sock: *mut bpf_sock, detour: &mut Detour) -> bool {
    keep((&raw const DETOURS).cast_mut().cast(), sock, detour)
}

/// Forgets what an earlier connect() of the socket was led to, unless that is what it now names: another of these programs
/// led it there just before.
#[inline(always)]
pub fn forget_detour(sock: *mut bpf_sock, now: &Endpoint) {
    if detour_of(sock).is_some_and(|detour| detour.actual != *now) {
        // SAFETY: a socket storage map and a socket from the context.
        let _ = unsafe { bpf_sk_storage_delete((&raw const DETOURS).cast_mut().cast(), sock.cast()) };
    }
}

/// Whom the socket is connected to, as the application named it.
#[inline(always)]
pub fn getpeername<const V6: bool>(ctx: &SockAddrContext) -> i32 {
    let Some(peer) = named::<V6>(ctx) else { return ALLOW };
    if let Some(detour) = detour_of(socket(ctx))
        && detour.actual == peer
    {
        let original = detour.original;
        rename::<V6>(ctx, &original);
    }
    ALLOW
}

/// A pointer that map helpers take, for a socket storage map.
#[inline(always)]
pub fn storage(map: &'static SkStorage<Detour>) -> *mut c_void {
    core::ptr::from_ref(map).cast_mut().cast()
}

/// The context as helpers take it.
#[inline(always)]
pub fn raw(ctx: &SockAddrContext) -> *mut c_void {
    ctx.as_ptr()
}
