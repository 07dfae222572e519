//! What a guest shows on its screen, as a PNG.
//!
//! Owns: that whatever a hypervisor gives becomes a PNG. Never: takes a size on trust. A crash here costs a picture.
//! Source: PPM (netpbm, ppm(5)), PNG (W3C, PNG Specification).

use libdeflater::{CompressionLvl, Compressor};

/// Largest picture that is taken, bytes.
pub const MOST: u64 = 64 << 20;
/// Largest side, pixels.
const SIDE: usize = 16_384;

/// A PNG of a PPM with 8 bits a colour; a PNG stays what it is. Nothing where it is neither.
pub fn png(picture: Vec<u8>) -> Option<Vec<u8>> {
    if picture.starts_with(b"\x89PNG\r\n\x1a\n") {
        return Some(picture);
    }
    let (width, height, pixels) = ppm(&picture)?;
    let mut rows = Vec::with_capacity(pixels.len() + height);
    for row in pixels.chunks_exact(width * 3) {
        // As it is, without a filter: screens of text are little as they are.
        rows.push(0);
        rows.extend_from_slice(row);
    }
    let mut compressor = Compressor::new(CompressionLvl::default());
    let mut packed = vec![0; compressor.zlib_compress_bound(rows.len())];
    let len = compressor.zlib_compress(&rows, &mut packed).ok()?;
    packed.truncate(len);
    let mut header = Vec::with_capacity(13);
    header.extend(u32::try_from(width).ok()?.to_be_bytes());
    header.extend(u32::try_from(height).ok()?.to_be_bytes());
    // 8 bits, red green blue, the one compression, the one filtering, not interlaced.
    header.extend([8, 2, 0, 0, 0]);
    let mut out = b"\x89PNG\r\n\x1a\n".to_vec();
    for (kind, data) in [(b"IHDR", &header), (b"IDAT", &packed), (b"IEND", &Vec::new())] {
        out.extend(u32::try_from(data.len()).ok()?.to_be_bytes());
        let from = out.len();
        out.extend(kind);
        out.extend(data);
        out.extend(crc32fast::hash(&out[from..]).to_be_bytes());
    }
    Some(out)
}

/// Width, height and pixels of a PPM.
fn ppm(picture: &[u8]) -> Option<(usize, usize, &[u8])> {
    let mut rest = picture.strip_prefix(b"P6")?;
    let mut numbers = [0usize; 3];
    for number in &mut numbers {
        loop {
            let first = *rest.first()?;
            if first == b'#' {
                rest = &rest[rest.iter().position(|byte| *byte == b'\n')?..];
            } else if first.is_ascii_whitespace() {
                rest = &rest[1..];
            } else {
                break;
            }
        }
        let digits = rest.iter().position(|byte| !byte.is_ascii_digit())?;
        *number = std::str::from_utf8(&rest[..digits]).ok()?.parse().ok()?;
        rest = &rest[digits..];
    }
    let [width, height, 255] = numbers else { return None };
    if !(1..=SIDE).contains(&width) || !(1..=SIDE).contains(&height) {
        return None;
    }
    // One blank, then the pixels.
    let pixels = rest.get(1..)?.get(..width * height * 3)?;
    Some((width, height, pixels))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_ppm_becomes_a_png_with_the_same_pixels() {
        let pixels: Vec<u8> = (0..5 * 3 * 3u8).collect();
        let ppm = [b"P6\n# by a hypervisor\n5 3\n255\n".as_slice(), &pixels].concat();
        let png = png(ppm.clone()).unwrap();
        assert_eq!(&png[..8], b"\x89PNG\r\n\x1a\n");
        let mut at = 8;
        let mut kinds = Vec::new();
        while at < png.len() {
            let len = u32::from_be_bytes(png[at..at + 4].try_into().unwrap()) as usize;
            let (kind, data) = (&png[at + 4..at + 8], &png[at + 8..at + 8 + len]);
            assert_eq!(crc32fast::hash(&png[at + 4..at + 8 + len]).to_be_bytes(), png[at + 8 + len..at + 12 + len]);
            match kind {
                b"IHDR" => assert_eq!(data, [0, 0, 0, 5, 0, 0, 0, 3, 8, 2, 0, 0, 0]),
                b"IDAT" => {
                    let mut rows = vec![0; 3 * 16];
                    libdeflater::Decompressor::new().zlib_decompress(data, &mut rows).unwrap();
                    let back: Vec<u8> = rows.chunks(16).flat_map(|row| row[1..].to_vec()).collect();
                    assert_eq!(back, pixels);
                }
                _ => {}
            }
            kinds.push(String::from_utf8(kind.to_vec()).unwrap());
            at += 12 + len;
        }
        assert_eq!(kinds, ["IHDR", "IDAT", "IEND"]);
        assert_eq!(super::png(png.clone()), Some(png));
        for bad in [&ppm[..ppm.len() - 1], b"P6\n99999999999 1\n255\n", b"P6 5 3 65535\n", b"P5 1 1 255\n0", b"P6", b""] {
            assert_eq!(super::png(bad.to_vec()), None);
        }
    }
}
