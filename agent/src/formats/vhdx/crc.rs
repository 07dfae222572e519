//! CRC-32C (Castagnoli), eight bytes a step by tables.
//!
//! Owns: the sum, and the sum of a structure that holds its own. Never: reads a file. A crash here costs nothing.

/// The reflected polynomial.
const POLYNOMIAL: u32 = 0x82f6_3b78;

/// `TABLES[k][b]`: what byte `b` does to the sum when `k` more bytes follow in the step.
static TABLES: [[u32; 256]; 8] = tables();

const fn tables() -> [[u32; 256]; 8] {
    let mut tables = [[0u32; 256]; 8];
    let mut byte = 0;
    while byte < 256 {
        let mut sum = byte as u32;
        let mut bit = 0;
        while bit < 8 {
            sum = if sum & 1 == 1 { sum >> 1 ^ POLYNOMIAL } else { sum >> 1 };
            bit += 1;
        }
        tables[0][byte] = sum;
        byte += 1;
    }
    let mut k = 1;
    while k < 8 {
        let mut byte = 0;
        while byte < 256 {
            let before = tables[k - 1][byte];
            tables[k][byte] = before >> 8 ^ tables[0][(before & 0xff) as usize];
            byte += 1;
        }
        k += 1;
    }
    tables
}

/// A sum in the making.
#[derive(Clone, Copy, Debug)]
pub(super) struct Crc(u32);

impl Crc {
    pub(super) fn new() -> Self {
        Self(u32::MAX)
    }

    pub(super) fn add(mut self, bytes: &[u8]) -> Self {
        let (steps, rest) = bytes.as_chunks::<8>();
        for step in steps {
            let low = self.0 ^ u32::from_le_bytes([step[0], step[1], step[2], step[3]]);
            self.0 = TABLES[7][(low & 0xff) as usize]
                ^ TABLES[6][(low >> 8 & 0xff) as usize]
                ^ TABLES[5][(low >> 16 & 0xff) as usize]
                ^ TABLES[4][(low >> 24) as usize]
                ^ TABLES[3][step[4] as usize]
                ^ TABLES[2][step[5] as usize]
                ^ TABLES[1][step[6] as usize]
                ^ TABLES[0][step[7] as usize];
        }
        for byte in rest {
            self.0 = self.0 >> 8 ^ TABLES[0][((self.0 ^ u32::from(*byte)) & 0xff) as usize];
        }
        self
    }

    pub(super) fn value(self) -> u32 {
        !self.0
    }
}

/// The sum of a structure whose bytes 4 to 7 hold it: they count as zeros. All checksums of VHDX lie there.
pub(super) fn of_structure(bytes: &[u8]) -> u32 {
    let (head, rest) = bytes.split_at(bytes.len().min(4));
    Crc::new().add(head).add(&[0; 4]).add(rest.get(4..).unwrap_or_default()).value()
}

/// Puts the sum of a structure into its bytes 4 to 7.
pub(super) fn seal(bytes: &mut [u8]) {
    let sum = of_structure(bytes);
    if let Some(field) = bytes.get_mut(4..8) {
        field.copy_from_slice(&sum.to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sums_of_rfc_3720_come_out_whatever_the_pieces() {
        assert_eq!(Crc::new().add(b"123456789").value(), 0xe306_9283);
        assert_eq!(Crc::new().add(&[0; 32]).value(), 0x8a91_36aa);
        assert_eq!(Crc::new().add(&[0xff; 32]).value(), 0x62a8_ab43);
        let ascending: Vec<u8> = (0..32).collect();
        assert_eq!(Crc::new().add(&ascending).value(), 0x46dd_794e);
        for cut in 0..32 {
            assert_eq!(Crc::new().add(&ascending[..cut]).add(&ascending[cut..]).value(), 0x46dd_794e);
        }
        let mut sealed = ascending;
        seal(&mut sealed);
        assert_eq!(sealed[4..8], of_structure(&sealed).to_le_bytes());
    }
}
