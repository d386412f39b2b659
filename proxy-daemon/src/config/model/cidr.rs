use std::{net::IpAddr, str::FromStr};

/// An address range. IPv4-mapped IPv6 addresses are treated as IPv4.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Cidr {
    /// The range's first address, with the host bits cleared.
    pub network: IpAddr,
    /// How many leading bits are fixed.
    pub prefix_len: u8,
}

impl Cidr {
    /// The range of `prefix_len` fixed bits around `address`; `None` where the length is too long for the family.
    pub fn new(address: IpAddr, prefix_len: u8) -> Option<Cidr> {
        let network = match address.to_canonical() {
            IpAddr::V4(v4) if prefix_len <= 32 => IpAddr::V4((v4.to_bits() & mask32(prefix_len)).into()),
            IpAddr::V6(v6) if prefix_len <= 128 => IpAddr::V6((v6.to_bits() & mask128(prefix_len)).into()),
            _ => return None,
        };
        Some(Cidr { network, prefix_len })
    }

    /// Whether the range holds `address`.
    pub fn contains(&self, address: IpAddr) -> bool {
        match (self.network, address.to_canonical()) {
            (IpAddr::V4(net), IpAddr::V4(ip)) => (ip.to_bits() & mask32(self.prefix_len)) == net.to_bits(),
            (IpAddr::V6(net), IpAddr::V6(ip)) => (ip.to_bits() & mask128(self.prefix_len)) == net.to_bits(),
            _ => false,
        }
    }
}

fn mask32(len: u8) -> u32 {
    u32::MAX.checked_shl(32 - u32::from(len)).unwrap_or(0)
}

fn mask128(len: u8) -> u128 {
    u128::MAX.checked_shl(128 - u32::from(len)).unwrap_or(0)
}

impl FromStr for Cidr {
    type Err = String;

    fn from_str(text: &str) -> Result<Cidr, String> {
        let bad = || format!("\"{text}\" is not an address range such as 10.0.0.0/8 or fd00::/8");
        let (address, len) = text.split_once('/').ok_or_else(bad)?;
        let address = address.parse().map_err(|_| bad())?;
        Cidr::new(address, len.parse().map_err(|_| bad())?).ok_or_else(bad)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holds_its_own_addresses_only() {
        let range: Cidr = "10.1.2.3/16".parse().unwrap();
        assert_eq!(range.network, "10.1.0.0".parse::<IpAddr>().unwrap());
        assert!(range.contains("10.1.255.1".parse().unwrap()));
        assert!(range.contains("::ffff:10.1.0.9".parse().unwrap()), "v4-mapped");
        assert!(!range.contains("10.2.0.1".parse().unwrap()));
        assert!(!range.contains("fd00::1".parse().unwrap()));
        assert!("0.0.0.0/0".parse::<Cidr>().unwrap().contains("1.2.3.4".parse().unwrap()));
        assert!("::/0".parse::<Cidr>().unwrap().contains("fd00::1".parse().unwrap()));
    }

    #[test]
    fn names_what_is_wrong() {
        for bad in ["10.0.0.0/33", "fd00::/129", "10.0.0.0", "x/8", "10.0.0.0/"] {
            assert!(bad.parse::<Cidr>().unwrap_err().contains(bad));
        }
    }
}
