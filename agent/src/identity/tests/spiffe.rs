use proptest::prelude::*;

use crate::identity::{SpiffeError, SpiffeId, TrustDomain};

#[test]
fn every_other_form_is_refused() {
    let long_path = format!("spiffe://mesh.test/ns/a/sa/{}", "b".repeat(2_048));
    let long_domain = format!("spiffe://{}/ns/a/sa/b", "d".repeat(256));
    let long_name = format!("spiffe://mesh.test/ns/{}/sa/b", "n".repeat(254));
    for (text, error) in [
        ("", SpiffeError::Scheme),
        ("mesh.test/ns/a/sa/b", SpiffeError::Scheme),
        ("SPIFFE://mesh.test/ns/a/sa/b", SpiffeError::Scheme),
        ("Spiffe://mesh.test/ns/a/sa/b", SpiffeError::Scheme),
        (" spiffe://mesh.test/ns/a/sa/b", SpiffeError::Scheme),
        ("https://mesh.test/ns/a/sa/b", SpiffeError::Scheme),
        ("spiffe:/mesh.test/ns/a/sa/b", SpiffeError::Scheme),
        ("spiffe://spiffe://mesh.test/ns/a/sa/b", SpiffeError::TrustDomain),
        ("spiffe:///ns/a/sa/b", SpiffeError::TrustDomain),
        ("spiffe://MESH.test/ns/a/sa/b", SpiffeError::TrustDomain),
        ("spiffe://user@mesh.test/ns/a/sa/b", SpiffeError::TrustDomain),
        ("spiffe://user:pass@mesh.test/ns/a/sa/b", SpiffeError::TrustDomain),
        ("spiffe://mesh.test:443/ns/a/sa/b", SpiffeError::TrustDomain),
        ("spiffe://mesh%2etest/ns/a/sa/b", SpiffeError::TrustDomain),
        ("spiffe://mesh.test\0/ns/a/sa/b", SpiffeError::TrustDomain),
        ("spiffe://mésh.test/ns/a/sa/b", SpiffeError::TrustDomain),
        ("spiffe://[::1]/ns/a/sa/b", SpiffeError::TrustDomain),
        (&long_domain, SpiffeError::TrustDomain),
        ("spiffe://mesh.test", SpiffeError::Path),
        ("spiffe://mesh.test/", SpiffeError::Path),
        ("spiffe://mesh.test?x", SpiffeError::Path),
        ("spiffe://mesh.test/ns/a", SpiffeError::Path),
        ("spiffe://mesh.test/ns/a/sa/", SpiffeError::Path),
        ("spiffe://mesh.test/ns//sa/b", SpiffeError::Path),
        ("spiffe://mesh.test//ns/a/sa/b", SpiffeError::Path),
        ("spiffe://mesh.test/NS/a/sa/b", SpiffeError::Path),
        ("spiffe://mesh.test/ns/A/sa/b", SpiffeError::Path),
        ("spiffe://mesh.test/ns/a/sa/B", SpiffeError::Path),
        ("spiffe://mesh.test/ns/a/sa/b/", SpiffeError::Path),
        ("spiffe://mesh.test/ns/a/sa/b/c", SpiffeError::Path),
        ("spiffe://mesh.test/ns/a/sa/b/sa/c", SpiffeError::Path),
        ("spiffe://mesh.test/ns/a/x/sa/b", SpiffeError::Path),
        ("spiffe://mesh.test/x/ns/a/sa/b", SpiffeError::Path),
        ("spiffe://mesh.test/ns/../sa/b", SpiffeError::Path),
        ("spiffe://mesh.test/ns/a/sa/..", SpiffeError::Path),
        ("spiffe://mesh.test/ns/a/sa/.", SpiffeError::Path),
        ("spiffe://mesh.test/ns/-a/sa/b", SpiffeError::Path),
        ("spiffe://mesh.test/ns/a/sa/b-", SpiffeError::Path),
        ("spiffe://mesh.test/ns/a_b/sa/b", SpiffeError::Path),
        ("spiffe://mesh.test/ns/a/sa/b?q=1", SpiffeError::Path),
        ("spiffe://mesh.test/ns/a/sa/b#f", SpiffeError::Path),
        ("spiffe://mesh.test/ns/a/sa/b%20", SpiffeError::Path),
        ("spiffe://mesh.test/ns/a/sa/b\0", SpiffeError::Path),
        ("spiffe://mesh.test/ns/a/sa/b\0.evil", SpiffeError::Path),
        ("spiffe://mesh.test/ns/a/sa/b ", SpiffeError::Path),
        ("spiffe://mesh.test/ns/a/sa/b\n", SpiffeError::Path),
        ("spiffe://mesh.test/ns/a/sa/bé", SpiffeError::Path),
        ("spiffe://mesh.test/ns/а/sa/b", SpiffeError::Path),
        (&long_name, SpiffeError::Path),
        (&long_path, SpiffeError::TooLong),
    ] {
        assert_eq!(text.parse::<SpiffeId>(), Err(error), "{text:?}");
    }
}

#[test]
fn a_name_with_a_slash_makes_no_other_identity() {
    let domain: TrustDomain = "mesh.test".parse().unwrap();
    for (namespace, account) in [("a/sa/b", "c"), ("a", "b/sa/c"), ("", "b"), ("a", ""), ("a/../b", "c"), ("a\0", "b")]
    {
        assert_eq!(SpiffeId::new(&domain, namespace, account), Err(SpiffeError::Path), "{namespace:?} {account:?}");
    }
}

proptest! {
    #[test]
    fn what_is_made_of_names_parses_back_to_them(
        domain in "[a-z0-9._-]{1,40}",
        namespace in "[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?",
        account in "[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?",
    ) {
        let trust_domain: TrustDomain = domain.parse().unwrap();
        let id = SpiffeId::new(&trust_domain, &namespace, &account).unwrap();
        prop_assert_eq!((id.trust_domain(), id.namespace(), id.service_account()), (&*domain, &*namespace, &*account));
        prop_assert_eq!(id.principal(), format!("{domain}/ns/{namespace}/sa/{account}"));
        prop_assert_eq!(id.as_str().parse::<SpiffeId>(), Ok(id.clone()));
    }

    #[test]
    fn whatever_parses_is_written_back_as_it_was(text in "(spiffe://)?[a-zA-Z0-9/.%@:\\PC-]{0,60}") {
        if let Ok(id) = text.parse::<SpiffeId>() {
            prop_assert_eq!(id.as_str(), &text);
            let parts = format!("spiffe://{}/ns/{}/sa/{}", id.trust_domain(), id.namespace(), id.service_account());
            prop_assert_eq!(parts, text);
        }
    }
}
