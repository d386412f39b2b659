//! `std::mt19937` of C++: Envoy's order of hosts to try next is made with it.

const WORDS: usize = 624;
const SHIFT: usize = 397;

/// Numbers that a seed decides. Two and a half kilobytes.
pub(super) struct Mersenne {
    words: [u32; WORDS],
    at: usize,
}

impl Mersenne {
    pub(super) fn new(seed: u32) -> Mersenne {
        let mut words = [seed; WORDS];
        for index in 1..WORDS {
            let before = words[index - 1];
            words[index] = (before ^ (before >> 30)).wrapping_mul(1_812_433_253).wrapping_add(index as u32);
        }
        Mersenne { words, at: WORDS }
    }

    pub(super) fn next(&mut self) -> u32 {
        if self.at == WORDS {
            for index in 0..WORDS {
                let mixed = (self.words[index] & 0x8000_0000) | (self.words[(index + 1) % WORDS] & 0x7fff_ffff);
                let twisted = (mixed >> 1) ^ if mixed & 1 == 1 { 0x9908_b0df } else { 0 };
                self.words[index] = self.words[(index + SHIFT) % WORDS] ^ twisted;
            }
            self.at = 0;
        }
        let mut word = self.words[self.at];
        self.at += 1;
        word ^= word >> 11;
        word ^= (word << 7) & 0x9d2c_5680;
        word ^= (word << 15) & 0xefc6_0000;
        word ^ (word >> 18)
    }

    /// A number less than `below`, each as often as the others, as Envoy draws it.
    pub(super) fn below(&mut self, below: u32) -> u32 {
        // Both at least 1: the result fits.
        let width = (1_u64 << 32) / u64::from(below);
        loop {
            let number = u64::from(self.next()) / width;
            if number < u64::from(below) {
                return number as u32;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_those_of_the_standard() {
        let mut random = Mersenne::new(5489);
        assert_eq!(random.next(), 3_499_211_612);
        // The standard names the ten thousandth.
        assert_eq!((2..10_000).map(|_| random.next()).count(), 9_998);
        assert_eq!(random.next(), 4_123_659_995);
    }
}
