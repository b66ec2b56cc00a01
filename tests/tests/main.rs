//! The lab's tests: a file asks one question, a test is a claim that answers it.

mod clean;
mod identity;
mod laboratory;
mod life;
mod load;
mod paths;
mod policy;
mod protocols;
mod services;
mod telemetry;
mod traces;
mod wire;
