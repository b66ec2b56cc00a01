//! The lab's tests: a file asks one question, a test is a claim that answers it.

mod abuse;
mod certificates;
mod churn;
mod clean;
mod fairness;
mod halfclose;
mod identity;
mod laboratory;
mod lane;
mod lane_claims;
mod lane_off;
mod lane_reuse;
mod lane_services;
mod life;
mod load;
mod paths;
mod policy;
mod proof;
mod protocols;
mod revocation;
mod services;
mod stalls;
mod telemetry;
mod traces;
mod trust;
mod wire;
