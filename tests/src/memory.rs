//! Private keys in the memory of a running process, found without its help: a window of 32 bytes whose public key stands in
//! one of the process' own certificates is that certificate's private key.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    fs::{self, File},
    os::unix::fs::FileExt,
    path::Path,
};

use anyhow::{Context, Result};
use aws_lc_rs::agreement::{ECDH_P256, PrivateKey};
use base64::{Engine, prelude::BASE64_STANDARD_NO_PAD};
use memchr::memmem;

/// Bytes of a P-256 scalar.
const SCALAR: usize = 32;
/// Bytes of an uncompressed point.
const POINT: usize = 65;
/// What stands before the point in a SubjectPublicKeyInfo of P-256 (RFC 5480).
const SPKI: [u8; 26] = [
    0x30, 0x59, 0x30, 0x13, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x08, 0x2a, 0x86, 0x48, 0xce,
    0x3d, 0x03, 0x01, 0x07, 0x03, 0x42, 0x00,
];
/// A certificate's name follows its key within this many bytes.
const NAME_WITHIN: usize = 512;
/// Bytes read at a time, and by how many two reads overlap.
const CHUNK: usize = 4 << 20;
const OVERLAP: usize = 4 << 10;
/// Most of a process' memory was never written.
const PAGE: usize = 4 << 10;
const ZEROS: [u8; PAGE] = [0; PAGE];
/// Largest file that is looked into (bytes).
const FILE: u64 = 64 << 20;

/// A private key that was found.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret {
    /// The SPIFFE id of a certificate or request with its public key.
    pub identity: String,
    /// Most significant byte first.
    scalar: [u8; SCALAR],
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Secret").field("identity", &self.identity).finish_non_exhaustive()
    }
}

impl Secret {
    /// The key of every P-256 certificate with a SPIFFE id in the memory of a process, if its key is there too.
    pub fn all_of(pid: u32) -> Result<Vec<Self>> {
        let mut named = BTreeMap::new();
        read(pid, |bytes| {
            for at in memmem::find_iter(bytes, &SPKI).map(|at| at + SPKI.len()) {
                if let (Some(point), Some(rest)) = (bytes.get(at..at + POINT), bytes.get(at + POINT..))
                    && let Some(identity) = identity(&rest[..rest.len().min(NAME_WITHIN)])
                {
                    named.insert(point.to_vec(), identity);
                }
            }
        })?;
        let mut candidates = BTreeSet::new();
        read(pid, |bytes| {
            for (page, start) in
                bytes.chunks(PAGE).zip((0..).step_by(PAGE)).filter(|(page, _)| !ZEROS.starts_with(page))
            {
                for at in (start..start + page.len()).step_by(8) {
                    if let Some(window) = bytes.get(at..at + SCALAR).filter(|window| may_be_a_scalar(window)) {
                        // aws-lc keeps numbers as words of this machine, the lowest first.
                        candidates.insert(window.iter().rev().copied().collect::<Vec<u8>>());
                    }
                }
            }
        })?;
        let found = candidates.into_iter().filter_map(|scalar| {
            let key = PrivateKey::from_private_key(&ECDH_P256, &scalar).ok()?;
            let identity = named.get(key.compute_public_key().ok()?.as_ref())?.clone();
            Some(Self { identity, scalar: scalar.try_into().ok()? })
        });
        Ok(found.collect())
    }

    /// How often it is in the memory of a process.
    pub fn copies(&self, pid: u32) -> Result<usize> {
        let forms = self.forms();
        let mut count = 0;
        read(pid, |bytes| count += forms.iter().map(|form| memmem::find_iter(bytes, form).count()).sum::<usize>())?;
        Ok(count)
    }

    /// Whether it is in these bytes, as it is or as text.
    #[must_use]
    pub fn is_in(&self, bytes: &[u8]) -> bool {
        self.forms().iter().any(|form| memmem::find(bytes, form).is_some())
    }

    /// As PKCS #8 has it, as words of this machine, in hex, and as it is inside base64 at each of its three places.
    fn forms(&self) -> Vec<Vec<u8>> {
        let reversed: Vec<u8> = self.scalar.iter().rev().copied().collect();
        let hex: String = self.scalar.iter().map(|byte| format!("{byte:02x}")).collect();
        let mut forms = vec![self.scalar.to_vec(), reversed, hex.to_uppercase().into(), hex.into()];
        for before in 0..3 {
            let text = BASE64_STANDARD_NO_PAD.encode([&vec![0; before][..], &self.scalar].concat());
            // Letters at both ends depend on what stands there.
            forms.push(text.as_bytes()[if before == 0 { 0 } else { before + 1 }..text.len() - 2].to_vec());
        }
        forms
    }

    /// Files below a folder, and files that a process has open, in which it is.
    pub fn in_files(&self, folder: &Path, pid: u32) -> Result<Vec<String>> {
        let mut places = Vec::new();
        walk(folder, &mut |path| self.look(path, &mut places))?;
        for entry in fs::read_dir(format!("/proc/{pid}/fd"))?.flatten() {
            self.look(&entry.path(), &mut places);
        }
        Ok(places)
    }

    fn look(&self, path: &Path, places: &mut Vec<String>) {
        let regular = fs::metadata(path).is_ok_and(|metadata| metadata.is_file() && metadata.len() <= FILE);
        if regular && fs::read(path).is_ok_and(|bytes| self.is_in(&bytes)) {
            places.push(path.display().to_string());
        }
    }
}

fn walk(folder: &Path, see: &mut impl FnMut(&Path)) -> Result<()> {
    for entry in fs::read_dir(folder).with_context(|| folder.display().to_string())? {
        let entry = entry?;
        if entry.file_type()?.is_dir() { walk(&entry.path(), see)? } else { see(&entry.path()) }
    }
    Ok(())
}

/// The first SPIFFE id, as a GeneralName of DER: its length stands in the byte before a name that is shorter than 128 bytes.
fn identity(bytes: &[u8]) -> Option<String> {
    let from = memmem::find(bytes, b"spiffe://")?;
    let length = usize::from(*bytes.get(from.checked_sub(1)?)?);
    String::from_utf8(bytes.get(from..from + length)?.to_vec()).ok()
}

/// Random enough: no word of it is a small number or a pointer, and of 32 bytes at least 20 differ.
fn may_be_a_scalar(window: &[u8]) -> bool {
    let zero_ends = |word: &[u8]| word[6] == 0 && word[7] == 0;
    if window.chunks_exact(8).any(zero_ends) {
        return false;
    }
    let mut seen = [false; 256];
    window.iter().filter(|byte| !std::mem::replace(&mut seen[usize::from(**byte)], true)).count() >= 20
}

/// Hands out everything that a process may write to, in pieces that overlap and begin at multiples of 8.
fn read(pid: u32, mut see: impl FnMut(&[u8])) -> Result<()> {
    let memory = File::open(format!("/proc/{pid}/mem")).context("memory of the process")?;
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let mut buffer = vec![0_u8; CHUNK];
    for line in maps.lines() {
        let mut parts = line.split_whitespace();
        let (Some(range), Some(rights)) = (parts.next(), parts.next()) else { continue };
        // Shared mappings are the kernel's maps and rings.
        if !rights.starts_with("rw") || rights.ends_with('s') {
            continue;
        }
        let (from, to) = range.split_once('-').context("a range of memory")?;
        let (mut at, end) = (u64::from_str_radix(from, 16)?, u64::from_str_radix(to, 16)?);
        while at < end {
            let length = usize::try_from(end - at)?.min(CHUNK);
            // What was unmapped meanwhile holds nothing.
            let Ok(read) = memory.read_at(&mut buffer[..length], at) else { break };
            see(&buffer[..read]);
            if read < CHUNK {
                break;
            }
            at += (CHUNK - OVERLAP) as u64;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use aws_lc_rs::{
        encoding::AsBigEndian,
        signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair},
    };

    use super::Secret;

    #[test]
    fn a_key_is_found_in_every_form_in_which_it_may_be_written() -> anyhow::Result<()> {
        let key = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_ASN1_SIGNING)?;
        let secret = Secret { identity: String::new(), scalar: key.private_key().as_be_bytes()?.as_ref().try_into()? };
        let document = key.to_pkcs8v1()?;
        assert!(secret.is_in(document.as_ref()));
        for before in 0..3 {
            use base64::{Engine, prelude::BASE64_STANDARD};
            let text = BASE64_STANDARD.encode([&vec![7; before], document.as_ref()].concat());
            assert!(secret.is_in(text.as_bytes()), "{before}");
        }
        let other = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_ASN1_SIGNING)?;
        assert!(!secret.is_in(other.to_pkcs8v1()?.as_ref()));
        Ok(())
    }
}
