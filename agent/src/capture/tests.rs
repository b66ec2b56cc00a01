//! Capture against the running kernel: a pod, its neighbour and the agent, each test with a netns pair, a cgroup and a bpffs folder
//! of its own. Needs root; without it each test prints that it was skipped.

mod adoption;
mod destroy;
mod inbound;
mod kubelet;
mod lane;
mod netns;
mod node;
mod outbound;
mod path;
mod withdrawal;
mod world;
