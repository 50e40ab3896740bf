//! The text that describes a VMDK: kind, content ids, extents. Pure. After the "Virtual Disk Format" note of VMware, with
//! what `qemu-img` and ESXi accept.

use std::fmt::Write;

/// Longest descriptor that is read, bytes.
pub const DESCRIPTOR_MAX: usize = 64 << 10;
/// Most extents of a disk that is read: 64 TiB in pieces of 2 GiB.
pub const EXTENTS_MAX: usize = 32 << 10;
/// `parentCID` of a disk without a parent.
pub const NO_PARENT: u32 = u32::MAX;
/// Digits of the longest number of sectors that a disk can grow to.
const SECTORS_DIGITS: usize = 12;
const SIGNATURE: &str = "# Disk DescriptorFile";

/// Kinds of VMDK that are read or written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// One sparse file with the descriptor inside.
    MonolithicSparse,
    /// Descriptor and one flat file.
    MonolithicFlat,
    /// Sparse files of 2 GiB.
    TwoGbMaxExtentSparse,
    /// Flat files of 2 GiB.
    TwoGbMaxExtentFlat,
    /// Descriptor and one flat file, as on a datastore.
    Vmfs,
    /// Compressed, written once.
    StreamOptimized,
}

impl Kind {
    const ALL: [(Kind, &'static str); 6] = [
        (Kind::MonolithicSparse, "monolithicSparse"),
        (Kind::MonolithicFlat, "monolithicFlat"),
        (Kind::TwoGbMaxExtentSparse, "twoGbMaxExtentSparse"),
        (Kind::TwoGbMaxExtentFlat, "twoGbMaxExtentFlat"),
        (Kind::Vmfs, "vmfs"),
        (Kind::StreamOptimized, "streamOptimized"),
    ];

    /// The value of `createType`.
    pub fn as_str(self) -> &'static str {
        Self::ALL.iter().find(|(kind, _)| *kind == self).map_or("", |(_, name)| name)
    }
}

/// What an extent line says is in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExtentKind {
    /// A sparse extent with a header of its own.
    Sparse,
    /// Plain bytes from an offset.
    Flat,
}

/// One extent line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExtentLine {
    /// Sectors of 512 bytes.
    pub sectors: u64,
    /// What the file holds.
    pub kind: ExtentKind,
    /// Name of the file, as written.
    pub file: String,
    /// First sector within the file; 0 for sparse extents.
    pub offset: u64,
}

/// A parsed descriptor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// Changes in every session that changes content.
    pub cid: u32,
    /// The parent's `cid` when this child was made; [`NO_PARENT`] without one.
    pub parent_cid: u32,
    /// Kind of disk.
    pub kind: Kind,
    /// Where the parent was, as written.
    pub parent_hint: Option<String>,
    /// The pieces, in order of the disk.
    pub extents: Vec<ExtentLine>,
}

impl Descriptor {
    /// Parses the text of a descriptor; bytes after the first zero do not count.
    ///
    /// # Errors
    /// What is wrong or not supported, as text.
    pub fn parse(bytes: &[u8]) -> Result<Descriptor, &'static str> {
        let bytes = bytes.split(|&b| b == 0).next().unwrap_or_default();
        if bytes.len() > DESCRIPTOR_MAX {
            return Err("the descriptor is longer than 64 KiB");
        }
        let text = String::from_utf8_lossy(bytes);
        if !text.starts_with(SIGNATURE) {
            return Err("the descriptor does not begin with its signature");
        }
        let (mut cid, mut parent_cid, mut kind, mut parent_hint, mut extents) = (None, NO_PARENT, None, None, Vec::new());
        for line in text.lines().map(str::trim) {
            if line.is_empty() || line.starts_with('#') || line.starts_with("ddb.") {
                continue;
            }
            if let Some((key, value)) = line.split_once('=').filter(|(key, _)| !key.contains('"') && !key.trim().contains(' ')) {
                let value = value.trim().trim_matches('"');
                match key.trim().to_ascii_lowercase().as_str() {
                    "cid" => cid = Some(u32::from_str_radix(value, 16).map_err(|_| "CID is not a hexadecimal number")?),
                    "parentcid" => parent_cid = u32::from_str_radix(value, 16).map_err(|_| "parentCID is not a hexadecimal number")?,
                    "createtype" => {
                        let found = Kind::ALL.iter().find(|(_, name)| name.eq_ignore_ascii_case(value));
                        kind = Some(found.ok_or("the createType is not one that this version reads")?.0);
                    }
                    "parentfilenamehint" => parent_hint = Some(value.to_owned()),
                    _ => {}
                }
                continue;
            }
            if extents.len() == EXTENTS_MAX {
                return Err("the descriptor lists more than 32768 extents");
            }
            extents.push(parse_extent(line)?);
        }
        if extents.is_empty() {
            return Err("the descriptor lists no extent");
        }
        let kind = kind.ok_or("the descriptor has no createType")?;
        if extents.iter().try_fold(0u64, |sum, e| sum.checked_add(e.sectors)).is_none_or(|sum| sum > 1 << 47) {
            return Err("the extents add up to more than any disk holds");
        }
        Ok(Descriptor { cid: cid.ok_or("the descriptor has no CID")?, parent_cid, kind, parent_hint, extents })
    }

    /// Whether there must be a parent.
    pub fn has_parent(&self) -> bool {
        self.parent_cid != NO_PARENT
    }

    /// Sectors of the disk.
    pub fn sectors(&self) -> u64 {
        self.extents.iter().map(|e| e.sectors).sum()
    }

    /// The text of a descriptor without a parent. The content id stands in the first 512 bytes, so that it can be changed in
    /// one sector.
    pub fn encode(&self) -> String {
        let sectors = self.sectors();
        let cylinders = (sectors / (255 * 63)).clamp(1, 65535);
        let mut text = format!(
            "{SIGNATURE}\nversion=1\nCID={:08x}\nparentCID={:08x}\ncreateType=\"{}\"\n",
            self.cid,
            self.parent_cid,
            self.kind.as_str()
        );
        // Room for a longer number, so that growing changes one sector and moves nothing.
        let room = self.extents.first().map_or(0, |e| SECTORS_DIGITS.saturating_sub(e.sectors.to_string().len()));
        let _ = writeln!(text, "\n# Extent description{:room$}", "");
        for extent in &self.extents {
            let kind = match (extent.kind, self.kind) {
                (ExtentKind::Sparse, _) => "SPARSE",
                (ExtentKind::Flat, Kind::Vmfs) => "VMFS",
                (ExtentKind::Flat, _) => "FLAT",
            };
            let _ = write!(text, "RW {} {kind} \"{}\"", extent.sectors, extent.file);
            // qemu wants the offset of FLAT extents and refuses one of VMFS extents.
            text.push_str(if kind == "FLAT" { " 0\n" } else { "\n" });
        }
        let _ = write!(
            text,
            "\n# The Disk Data Base\n#DDB\n\nddb.virtualHWVersion = \"7\"\nddb.geometry.cylinders = \"{cylinders}\"\nddb.geometry.heads = \"255\"\nddb.geometry.sectors = \"63\"\nddb.adapterType = \"lsilogic\"\n"
        );
        if self.kind == Kind::Vmfs {
            text.push_str("ddb.thinProvisioned = \"1\"\n");
        }
        text
    }
}

/// The first sector of a descriptor with another content id; `None` if the id does not stand in it.
pub fn with_cid(sector: &[u8], cid: u32) -> Option<Vec<u8>> {
    let at = sector.windows(5).position(|w| w == b"\nCID=")? + 5;
    let mut changed = sector.to_vec();
    // qemu writes ids without leading zeroes: as many digits are changed as there are.
    let len = changed[at..].iter().take(8).take_while(|b| b.is_ascii_hexdigit()).count();
    if len == 0 || at + len == changed.len() {
        return None;
    }
    changed[at..at + len].copy_from_slice(&format!("{cid:08x}").as_bytes()[8 - len..]);
    Some(changed)
}

/// The first sector of a descriptor of one extent with another number of sectors; `None` if there is no room for it there.
pub fn with_sectors(sector: &[u8], sectors: u64) -> Option<Vec<u8>> {
    const COMMENT: &[u8] = b"\n# Extent description";
    let start = sector.windows(COMMENT.len()).position(|w| w == COMMENT)? + COMMENT.len();
    let spaces = sector[start..].iter().take_while(|&&b| b == b' ').count();
    let number = start + spaces + 4;
    if sector.get(start + spaces..number)? != b"\nRW " {
        return None;
    }
    let digits = sector[number..].iter().take_while(|b| b.is_ascii_digit()).count();
    let text = sectors.to_string();
    let pad = (spaces + digits).checked_sub(text.len())?;
    if digits == 0 || sector.get(number + digits) != Some(&b' ') {
        return None;
    }
    let mut changed = sector.to_vec();
    changed[start..number + digits].copy_from_slice(format!("{:pad$}\nRW {text}", "").as_bytes());
    Some(changed)
}

fn parse_extent(line: &str) -> Result<ExtentLine, &'static str> {
    const SHAPE: &str = "an extent line does not read: RW SECTORS KIND \"FILE\" [OFFSET]";
    let (front, rest) = line.split_once('"').ok_or(match line.contains("ZERO") {
        true => "extents of zeroes are not read by this version",
        false => SHAPE,
    })?;
    let (file, after) = rest.rsplit_once('"').ok_or(SHAPE)?;
    let words: Vec<&str> = front.split_whitespace().collect();
    let [access, sectors, kind] = words[..] else { return Err(SHAPE) };
    if access != "RW" {
        return Err("extents that are not RW are not read by this version: readers disagree about them");
    }
    let sectors: u64 = sectors.parse().map_err(|_| SHAPE)?;
    let offset = match after.trim() {
        "" => None,
        text => Some(text.parse::<u64>().map_err(|_| SHAPE)?),
    };
    let kind = match (kind, offset) {
        ("SPARSE", _) => ExtentKind::Sparse,
        ("FLAT", Some(_)) => ExtentKind::Flat,
        ("FLAT", None) => return Err("a FLAT extent has no offset"),
        ("VMFS", None) => ExtentKind::Flat,
        ("VMFS", Some(_)) => return Err("a VMFS extent has an offset"),
        _ => return Err("the kind of an extent is not one that this version reads"),
    };
    let offset = if kind == ExtentKind::Flat { offset.unwrap_or(0) } else { 0 };
    if sectors == 0 || file.is_empty() || offset > 1 << 47 {
        return Err("an extent is empty or its file has no name");
    }
    Ok(ExtentLine { sectors, kind, file: file.to_owned(), offset })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sample(kind: Kind, line: ExtentKind) -> Descriptor {
        let extents = vec![ExtentLine { sectors: 4096, kind: line, file: "a b.vmdk".to_owned(), offset: 0 }];
        Descriptor { cid: 0x1234_abcd, parent_cid: NO_PARENT, kind, parent_hint: None, extents }
    }

    #[test]
    fn descriptors_round_trip() {
        for (kind, line) in
            [(Kind::MonolithicSparse, ExtentKind::Sparse), (Kind::MonolithicFlat, ExtentKind::Flat), (Kind::Vmfs, ExtentKind::Flat)]
        {
            let descriptor = sample(kind, line);
            assert_eq!(Descriptor::parse(descriptor.encode().as_bytes()), Ok(descriptor));
        }
    }

    #[test]
    fn the_content_id_changes_within_the_first_sector() {
        let text = sample(Kind::Vmfs, ExtentKind::Flat).encode();
        let changed = with_cid(&text.as_bytes()[..text.len().min(512)], 0xdead_beef).expect("it stands there");
        assert_eq!(Descriptor::parse(&[&changed, &text.as_bytes()[text.len().min(512)..]].concat()).unwrap().cid, 0xdead_beef);
    }

    #[test]
    fn the_number_of_sectors_changes_in_place() {
        for kind in [Kind::Vmfs, Kind::MonolithicFlat] {
            let text = sample(kind, ExtentKind::Flat).encode().into_bytes();
            let (sector, rest) = text.split_at(text.len().min(512));
            let changed = [&with_sectors(sector, 999_999_999_999).expect("there is room"), rest].concat();
            let parsed = Descriptor::parse(&changed).unwrap();
            assert_eq!((changed.len(), parsed.sectors(), parsed.cid), (text.len(), 999_999_999_999, 0x1234_abcd));
            assert_eq!(with_sectors(sector, 1_000_000_000_000), None, "no room");
            assert_eq!(with_sectors(&[&changed[..sector.len()]].concat(), 4096).unwrap(), sector, "and back");
        }
    }

    #[test]
    fn lines_that_readers_disagree_about_are_refused() {
        let base = "# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\ncreateType=\"monolithicFlat\"\n";
        let with = |line: &str| Descriptor::parse(format!("{base}{line}\n").as_bytes());
        assert!(with("RW 100 FLAT \"a.vmdk\" 0").is_ok());
        assert!(with("RW 100 VMFS \"a.vmdk\"").is_ok());
        for bad in [
            "RW 100 FLAT \"a.vmdk\"",
            "RW 100 VMFS \"a.vmdk\" 0",
            "RW 100 ZERO",
            "RDONLY 100 FLAT \"a.vmdk\" 0",
            "NOACCESS 100 FLAT \"a.vmdk\" 0",
            "RW 0 FLAT \"a.vmdk\" 0",
            "RW 18446744073709551615 FLAT \"a.vmdk\" 0",
            "RW 100 SESPARSE \"a.vmdk\"",
            "RW x FLAT \"a.vmdk\" 0",
        ] {
            assert!(with(bad).is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_parsed_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            let _ = Descriptor::parse(&bytes);
            let _ = Descriptor::parse(&[SIGNATURE.as_bytes(), b"\n", &bytes].concat());
        }
    }
}
