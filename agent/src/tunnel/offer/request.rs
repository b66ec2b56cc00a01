//! The CONNECT request of HBONE, field by field. Pure.

use std::{fmt::Write, net::SocketAddr, sync::Arc};

use http::{HeaderValue, Method, Request, Response, Uri, header::HeaderName};

use crate::{
    cluster::{Service, Workload},
    tunnel::{
        Session, Trace,
        proof::{self, Recorder},
    },
};

pub(crate) const FORWARDED: HeaderName = HeaderName::from_static("forwarded");
pub(crate) const BAGGAGE: HeaderName = HeaderName::from_static("baggage");
pub(crate) const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");

/// What one CONNECT says.
#[derive(Debug, Clone)]
pub(crate) struct Connect {
    uri: Uri,
    forwarded: HeaderValue,
    baggage: Option<HeaderValue>,
    traceparent: Option<HeaderValue>,
    /// Asks the peer what it sees of this connection, and notes its answer here.
    proof: Option<Recorder>,
}

impl Connect {
    /// `target` is the chosen pod's address; `client` the app's own; `trace` this side's span.
    pub fn new(
        target: SocketAddr,
        client: SocketAddr,
        service: Option<&Service>,
        baggage: Option<HeaderValue>,
        trace: Option<&Trace>,
    ) -> Result<Self, http::Error> {
        let traceparent = trace.and_then(|trace| HeaderValue::try_from(trace.traceparent()).ok());
        Ok(Self {
            uri: Uri::builder().authority(target.to_string()).build()?,
            forwarded: HeaderValue::try_from(forwarded(client, service))?,
            baggage,
            traceparent,
            proof: None,
        })
    }

    /// The same, asked to prove itself where `recorder` is given.
    pub fn proving(self, recorder: Option<Recorder>) -> Self {
        Self { proof: recorder, ..self }
    }

    /// The peer has answered.
    pub fn answered<B>(&self, response: &Response<B>, session: Option<&Arc<Session>>) {
        if let Some(recorder) = &self.proof {
            proof::answered(recorder, response.status().as_u16(), response.headers(), session);
        }
    }

    pub fn request(&self) -> Request<()> {
        let mut request = Request::new(());
        *request.method_mut() = Method::CONNECT;
        *request.uri_mut() = self.uri.clone();
        let headers = request.headers_mut();
        headers.insert(FORWARDED, self.forwarded.clone());
        if let Some(baggage) = &self.baggage {
            headers.insert(BAGGAGE, baggage.clone());
        }
        if let Some(traceparent) = &self.traceparent {
            headers.insert(TRACEPARENT, traceparent.clone());
        }
        if self.proof.is_some() {
            headers.insert(proof::HEADER, HeaderValue::from_static("1"));
        }
        request
    }
}

/// RFC 7239; the address is quoted because of its colon.
fn forwarded(client: SocketAddr, service: Option<&Service>) -> String {
    let mut text = format!("for=\"{client}\"");
    if let Some(service) = service {
        text.push_str(";host=");
        text.push_str(&service.hostname);
    }
    text
}

/// What the source says of itself (W3C Baggage): for the other side's telemetry, never for its policy.
pub(crate) fn baggage(cluster_id: &str, source: &Workload) -> Option<HeaderValue> {
    let kind = match source.naming.workload_kind {
        "deployment" => "k8s.deployment.name",
        "cronjob" => "k8s.cronjob.name",
        "job" => "k8s.job.name",
        _ => "k8s.pod.name",
    };
    let members = [
        ("k8s.cluster.name", cluster_id),
        ("k8s.namespace.name", &source.namespace),
        (kind, &source.naming.workload),
        ("service.name", &source.naming.canonical_name),
        ("service.version", &source.naming.canonical_revision),
    ];
    let mut text = String::new();
    for (key, value) in members {
        if value.is_empty() {
            continue;
        }
        if !text.is_empty() {
            text.push(',');
        }
        text.push_str(key);
        text.push('=');
        encode(&mut text, value);
    }
    HeaderValue::try_from(text).ok()
}

/// Percent-encodes what a baggage value may not hold (W3C Baggage §3.3.1: `baggage-octet`).
fn encode(text: &mut String, value: &str) {
    for byte in value.bytes() {
        match byte {
            b'"' | b',' | b';' | b'\\' | b'%' => {}
            0x21..=0x7e => {
                text.push(char::from(byte));
                continue;
            }
            _ => {}
        }
        // Writing to a String can't fail.
        let _ = write!(text, "%{byte:02X}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tunnel::tests::workload;

    #[test]
    fn connect_says_what_hbone_says() {
        let mut source = Workload::clone(&workload("cart", &["10.0.0.1"], true));
        source.naming.workload_kind = "deployment";
        source.naming.workload = "cart".into();
        source.naming.canonical_name = "cart".into();
        source.naming.canonical_revision = "v1,2".into();
        let service = Service::named("shop", "web");
        let trace = Trace::begin(true);
        let connect = Connect::new(
            "[fd00::2]:8080".parse().unwrap(),
            "10.0.0.1:4000".parse().unwrap(),
            Some(&service),
            baggage("east 1", &source),
            Some(&trace),
        );
        let request = connect.unwrap().request();
        assert_eq!(request.method(), Method::CONNECT);
        assert_eq!(request.uri().authority().unwrap().as_str(), "[fd00::2]:8080");
        assert_eq!((request.uri().scheme(), request.uri().path_and_query()), (None, None));
        let header = |name| request.headers().get(&name).unwrap().to_str().unwrap().to_owned();
        assert_eq!(header(FORWARDED), "for=\"10.0.0.1:4000\";host=web.shop.svc.cluster.local");
        assert_eq!(
            header(BAGGAGE),
            "k8s.cluster.name=east%201,k8s.namespace.name=default,k8s.deployment.name=cart,service.name=cart,\
             service.version=v1%2C2"
        );
        assert_eq!(header(TRACEPARENT), trace.traceparent());
    }

    #[test]
    fn an_ipv6_client_is_bracketed_and_no_service_is_no_host() {
        assert_eq!(forwarded("[fd00::1]:5".parse().unwrap(), None), "for=\"[fd00::1]:5\"");
    }
}
