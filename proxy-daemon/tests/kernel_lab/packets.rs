//! Packets for single runs of the programs.

use std::os::fd::{AsFd as _, AsRawFd as _};

use aya::programs::{SchedClassifier, TcAttachType};

use super::{CLIENT, CLIENT_V6, Lab, VIP, VIP_V6};

/// One run of the program of an interface with a packet: what it says, and the packet afterwards.
pub fn run_packet(lab: &Lab, interface: &str, packet: &[u8]) -> Option<(u32, Vec<u8>)> {
    /// The part of `union bpf_attr` for BPF_PROG_TEST_RUN (linux/bpf.h).
    #[repr(C)]
    struct TestRun {
        program: u32,
        result: u32,
        size_in: u32,
        size_out: u32,
        data_in: u64,
        data_out: u64,
        repeat: u32,
        duration: u32,
        context_size_in: u32,
        context_size_out: u32,
        context_in: u64,
        rest: [u64; 3],
    }
    /// The part of `struct __sk_buff` up to the interface over which the packet comes.
    #[repr(C)]
    struct Context {
        before: [u32; 10],
        interface: u32,
    }
    const BPF_PROG_TEST_RUN: i32 = 10;
    lab.node.run(|| {
        let (_, programs) = SchedClassifier::query_tcx(interface, TcAttachType::Ingress).expect("query");
        let program = programs.first().expect("a program").fd().expect("its descriptor");
        let interface = nix::net::if_::if_nametoindex(interface).expect("an interface");
        let context = Context { before: [0; 10], interface };
        let mut out = vec![0_u8; packet.len() + 64];
        let mut attributes = TestRun {
            program: program.as_fd().as_raw_fd().cast_unsigned(),
            result: 0,
            size_in: packet.len() as u32,
            size_out: out.len() as u32,
            data_in: packet.as_ptr() as u64,
            data_out: out.as_mut_ptr() as u64,
            repeat: 1,
            duration: 0,
            context_size_in: size_of::<Context>() as u32,
            context_size_out: 0,
            context_in: (&raw const context) as u64,
            rest: [0; 3],
        };
        let size = size_of::<TestRun>();
        // SAFETY: the attributes are laid out as the kernel's, and what they point to outlives the call.
        let result =
            unsafe { nix::libc::syscall(nix::libc::SYS_bpf, BPF_PROG_TEST_RUN, &raw mut attributes, size as u32) };
        out.truncate(attributes.size_out as usize);
        (result == 0).then_some((attributes.result, out))
    })
}

/// A frame with a SYN in it. `options` of IP are whole words.
pub fn syn(ipv6: bool, options: &[u8]) -> Vec<u8> {
    let mut tcp = vec![0x9c, 0x40, 0, 80, 1, 2, 3, 4, 0, 0, 0, 0, 0x60, 0x02, 0xfa, 0xf0, 0, 0, 0, 0, 2, 4, 5, 0xb4];
    let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
    let pseudo;
    if ipv6 {
        let (source, destination): (std::net::Ipv6Addr, std::net::Ipv6Addr) =
            (CLIENT_V6.parse().unwrap(), VIP_V6.parse().unwrap());
        frame.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, tcp.len() as u8, 6, 17]);
        pseudo = [source.octets(), destination.octets()].concat();
        frame.extend(&pseudo);
    } else {
        let (source, destination): (std::net::Ipv4Addr, std::net::Ipv4Addr) =
            (CLIENT.parse().unwrap(), VIP.parse().unwrap());
        let words = 5 + options.len() / 4;
        frame.extend([8, 0]);
        let total = (words * 4 + tcp.len()) as u8;
        let mut ip = vec![0x40 | words as u8, 0, 0, total, 0, 1, 0x40, 0, 17, 6, 0, 0];
        pseudo = [source.octets(), destination.octets()].concat();
        ip.extend(&pseudo);
        ip.extend(options);
        let sum = checksum(&[&ip]);
        ip[10..12].copy_from_slice(&sum.to_be_bytes());
        frame.extend(ip);
    }
    let sum = checksum(&[&pseudo, &[0, 6, 0, tcp.len() as u8], &tcp]);
    tcp[16..18].copy_from_slice(&sum.to_be_bytes());
    frame.extend(tcp);
    frame
}

/// The Internet checksum of what is even in length.
pub fn checksum(parts: &[&[u8]]) -> u16 {
    let words = parts.iter().flat_map(|part| part.chunks(2)).map(|two| u32::from(u16::from_be_bytes([two[0], two[1]])));
    let mut sum: u32 = words.sum();
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}
