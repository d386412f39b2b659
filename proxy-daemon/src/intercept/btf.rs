//! Reads from the running kernel's type information (BTF) where fields are in its structures.
//!
//! The kernel programs are compiled without CO-RE relocations, which Rust cannot express; aya reads BTF too, but shows
//! no members.

use std::collections::HashMap;
use std::fs;

/// Where the kernel shows its type information.
const KERNEL_BTF: &str = "/sys/kernel/btf/vmlinux";
const MAGIC: u32 = 0xeb9f;

// Kinds of types (linux/btf.h) that carry data after their common part, with its size.
const KIND_INT: u32 = 1;
const KIND_ARRAY: u32 = 3;
const KIND_STRUCT: u32 = 4;
const KIND_UNION: u32 = 5;
const KIND_ENUM: u32 = 6;
const KIND_FUNC_PROTO: u32 = 13;
const KIND_VAR: u32 = 14;
const KIND_DATASEC: u32 = 15;
const KIND_DECL_TAG: u32 = 17;
const KIND_ENUM64: u32 = 19;

/// Every structure of a kernel.
pub(super) struct Btf {
    bytes: Vec<u8>,
    strings: usize,
    /// Structures and unions by type number.
    composites: HashMap<u32, Composite>,
}

/// Where a structure's or union's members are described.
struct Composite {
    is_struct: bool,
    name: u32,
    members: usize,
    count: u32,
    /// Offsets share their word with the sizes of bit fields.
    has_bit_fields: bool,
}

impl Btf {
    /// The running kernel's.
    pub(super) fn of_kernel() -> Result<Self, String> {
        let bytes = fs::read(KERNEL_BTF)
            .map_err(|error| format!("the kernel tells no types (CONFIG_DEBUG_INFO_BTF): {KERNEL_BTF}: {error}"))?;
        Self::parse(bytes).ok_or_else(|| format!("{KERNEL_BTF} is not understood"))
    }

    fn parse(bytes: Vec<u8>) -> Option<Self> {
        let mut btf = Self { bytes, strings: 0, composites: HashMap::new() };
        if btf.word(0)? & 0xffff != MAGIC {
            return None;
        }
        let at = |header_word: usize| Some(btf.word(header_word)? as usize);
        let header = at(4)?;
        let (mut at_type, types_end) = (header.checked_add(at(8)?)?, header.checked_add(at(8)?)?.checked_add(at(12)?)?);
        btf.strings = header.checked_add(at(16)?)?;
        let mut number = 0;
        while at_type < types_end {
            number += 1;
            let (name, info) = (btf.word(at_type)?, btf.word(at_type + 4)?);
            let (kind, count) = (info >> 24 & 0x1f, info & 0xffff);
            let data = at_type + 12;
            if matches!(kind, KIND_STRUCT | KIND_UNION) {
                let (is_struct, has_bit_fields) = (kind == KIND_STRUCT, info >> 31 == 1);
                let composite = Composite { is_struct, name, members: data, count, has_bit_fields };
                btf.composites.insert(number, composite);
            }
            at_type = data
                + match kind {
                    KIND_INT | KIND_VAR | KIND_DECL_TAG => 4,
                    KIND_ARRAY => 12,
                    KIND_STRUCT | KIND_UNION | KIND_DATASEC | KIND_ENUM64 => 12 * count as usize,
                    KIND_ENUM | KIND_FUNC_PROTO => 8 * count as usize,
                    _ => 0,
                };
        }
        Some(btf)
    }

    /// How many bytes a member is from the start of a structure; the path leads through members that are structures.
    pub(super) fn offset_of(&self, structure: &str, path: &[&str]) -> Result<u32, String> {
        let starts = self.composites.values().filter(|composite| {
            composite.is_struct && self.string(composite.name).is_some_and(|name| name == structure.as_bytes())
        });
        // More than one type may have the name: the one that has the member is meant.
        for start in starts {
            let mut found = Some((0, Some(start)));
            for member in path {
                found = found.and_then(|(offset, composite)| {
                    let (inner, target) = self.member(composite?, member)?;
                    Some((offset + inner, self.composites.get(&target)))
                });
            }
            if let Some((offset, _)) = found {
                return Ok(offset);
            }
        }
        Err(format!("this kernel's struct {structure} has no member {}", path.join(".")))
    }

    /// A member's offset and the number of its type. Members of unnamed members count as the structure's own.
    fn member(&self, composite: &Composite, wanted: &str) -> Option<(u32, u32)> {
        for index in 0..composite.count as usize {
            let at = composite.members + index * 12;
            let (name, target, place) = (self.word(at)?, self.word(at + 4)?, self.word(at + 8)?);
            let bits = if composite.has_bit_fields { place & 0xff_ffff } else { place };
            let name = self.string(name)?;
            if name == wanted.as_bytes() {
                return Some((bits / 8, target));
            }
            if name.is_empty()
                && let Some(inner) = self.composites.get(&target)
                && let Some((offset, target)) = self.member(inner, wanted)
            {
                return Some((bits / 8 + offset, target));
            }
        }
        None
    }

    fn word(&self, at: usize) -> Option<u32> {
        let bytes = self.bytes.get(at..at.checked_add(4)?)?;
        Some(u32::from_ne_bytes(bytes.try_into().ok()?))
    }

    fn string(&self, offset: u32) -> Option<&[u8]> {
        let rest = self.bytes.get(self.strings.checked_add(offset as usize)?..)?;
        rest.split(|byte| *byte == 0).next()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_of_the_running_kernel_are_found() {
        let btf = Btf::of_kernel().expect("this kernel has BTF");
        // A pair of pointers: the same on every 64-bit kernel.
        assert_eq!(btf.offset_of("list_head", &["prev"]), Ok(8));
        let copied = btf.offset_of("tcp_sock", &["copied_seq"]).expect("copied_seq");
        let written = btf.offset_of("tcp_sock", &["write_seq"]).expect("write_seq");
        assert_ne!(copied, written);
        assert!(btf.offset_of("sock", &["sk_backlog", "rmem_alloc"]).is_ok());
        // Through an unnamed union.
        assert!(btf.offset_of("sk_buff", &["dev"]).is_ok());
    }

    #[test]
    fn what_is_missing_is_named() {
        let btf = Btf::of_kernel().expect("this kernel has BTF");
        let error = btf.offset_of("sock", &["sk_backlog", "no_such"]).unwrap_err();
        assert_eq!(error, "this kernel's struct sock has no member sk_backlog.no_such");
    }

    #[test]
    fn bytes_that_are_no_type_information_are_refused() {
        for bytes in [Vec::new(), vec![0; 64], vec![0x9f, 0xeb, 1, 0, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0]] {
            assert!(Btf::parse(bytes).is_none());
        }
    }
}
