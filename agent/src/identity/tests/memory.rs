//! I2: a key is in memory once, as long as it is used, and nowhere afterwards. The lab looks for the keys of a running agent;
//! here the scalar is known.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
};

use rustls::SignatureScheme;

use super::support::id;
use crate::identity::key::WorkloadKey;

const SCALAR: usize = 32;

/// A scalar that is not itself found: every byte is changed.
struct Masked([u8; SCALAR]);

impl Masked {
    const MASK: u8 = 0x5a;

    fn of(key: &WorkloadKey) -> Self {
        let scalar = key.scalar();
        Self(std::array::from_fn(|at| scalar.as_ref()[at] ^ Self::MASK))
    }

    fn is(&self, window: &[u8]) -> bool {
        // As PKCS #8 has it, and as the words of a little-endian machine.
        let same = |(seen, masked): (&u8, &u8)| seen ^ Self::MASK == *masked;
        window.iter().zip(&self.0).all(same) || window.iter().rev().zip(&self.0).all(same)
    }

    /// How often it is in what this process may write to.
    fn copies(&self) -> usize {
        let memory = File::open("/proc/self/mem").unwrap();
        let maps = fs::read_to_string("/proc/self/maps").unwrap();
        let mut buffer = vec![0_u8; 1 << 20];
        let own = buffer.as_ptr() as u64..buffer.as_ptr() as u64 + buffer.len() as u64;
        let mut found = 0;
        for line in maps.lines().filter(|line| line.split(' ').nth(1).is_some_and(|rights| rights.starts_with("rw"))) {
            let (from, to) = line.split(' ').next().unwrap().split_once('-').unwrap();
            let [mut at, end] = [from, to].map(|text| u64::from_str_radix(text, 16).unwrap());
            while at + SCALAR as u64 <= end {
                let length = usize::try_from(end - at).unwrap().min(buffer.len());
                // Parts of a mapping may be gone by now.
                let Ok(read) = memory.read_at(&mut buffer[..length], at) else { break };
                let windows = (at..).zip(buffer[..read].windows(SCALAR));
                found += windows.filter(|(place, window)| !own.contains(place) && self.is(window)).count();
                if read < SCALAR {
                    break;
                }
                at += (read - SCALAR + 1) as u64;
            }
        }
        found
    }
}

/// Says that this is the process whose memory is searched: one of its own, as other tests would make it large.
const SEARCHED: &str = "HEDDLE_TEST_MEMORY";

#[test]
fn i2_a_key_that_was_used_is_wiped_when_it_is_dropped() {
    if std::env::var_os(SEARCHED).is_none() {
        let mut own = std::process::Command::new(std::env::current_exe().unwrap());
        let name = "identity::tests::memory::i2_a_key_that_was_used_is_wiped_when_it_is_dropped";
        let ended = own.args(["--exact", name]).env(SEARCHED, "1").output().unwrap();
        let said = String::from_utf8_lossy(&ended.stdout);
        assert!(
            ended.status.success() && said.contains("1 passed"),
            "{said}{}",
            String::from_utf8_lossy(&ended.stderr)
        );
        return;
    }
    let key = WorkloadKey::generate().unwrap();
    let masked = Masked::of(&key);
    assert!(key.request(&id("shop", "web")).unwrap().contains("CERTIFICATE REQUEST"));
    let key = key.into_signing_key();
    let signer = key.choose_scheme(&[SignatureScheme::ECDSA_NISTP256_SHA256]).unwrap();
    assert!(!signer.sign(b"a handshake").unwrap().is_empty());
    drop(signer);
    assert_eq!(masked.copies(), 1, "while it is used it is in one place");
    drop(key);
    assert_eq!(masked.copies(), 0);
}

#[test]
fn a_key_signs_for_rustls_as_its_public_key_says() {
    let key = WorkloadKey::generate().unwrap();
    let csr = key.request(&id("shop", "web")).unwrap();
    let requested = rcgen::CertificateSigningRequestParams::from_pem(&csr).unwrap();
    let key = key.into_signing_key();
    assert_eq!(key.algorithm(), rustls::SignatureAlgorithm::ECDSA);
    assert!(key.choose_scheme(&[SignatureScheme::ED25519, SignatureScheme::ECDSA_NISTP384_SHA384]).is_none());
    let issuer = super::support::TestRoot::new("a root");
    let issuing = rcgen::Issuer::from_ca_cert_der(issuer.certificate.der(), &issuer.key).unwrap();
    let signed = requested.signed_by(&issuing).unwrap();
    let certified = rustls::sign::CertifiedKey::new(vec![signed.der().clone()], key);
    certified.keys_match().unwrap();
    assert_eq!(format!("{:?}", WorkloadKey::generate().unwrap()), "WorkloadKey(..)");
}
