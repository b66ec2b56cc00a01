//! Every cap and deadline of the agent: name, unit, default and why that much. Nothing else in the tree states one.

use std::time::Duration;

use super::budget::Rate;

/// A peer that sends no complete TLS handshake in this time is gone (duration). Handshakes take milliseconds; 5 s
/// survives a lost SYN-ACK and two retransmissions. A little more, so that the peer too sees no less than 5 s.
pub const TLS_HANDSHAKE: Duration = Duration::from_millis(5_200);
/// From an accepted TLS connection to its first CONNECT (duration).
pub const FIRST_CONNECT: Duration = Duration::from_secs(5);
/// TCP connect to another agent or to an endpoint outside the mesh (duration). What applications expect at the least.
pub const CONNECT_PEER: Duration = Duration::from_secs(5);
/// TCP connect to the app in its own netns (duration): it answers or it refuses; only a full backlog takes longer.
pub const CONNECT_APP: Duration = Duration::from_secs(5);
/// From sending CONNECT to the answer (duration): the other side's CONNECT_APP and policy hold, and a round trip.
pub const CONNECT_ANSWER: Duration = Duration::from_secs(10);
/// How long a connection waits for its certificate, or for the record of a workload that is not known yet (duration).
pub const HOLD: Duration = Duration::from_secs(5);

/// HTTP/2 streams that one connection carries at most, both sides (streams).
pub const STREAMS_PER_CONNECTION: u32 = 64;
/// Streams after which the pool opens another connection to the same peer while it has fewer than
/// [`CONNECTIONS_PER_PEER`] (streams): one connection is one task, so one core.
pub const STREAMS_BEFORE_SPREADING: u32 = 4;
/// Connections that the pool spreads over before it fills them up (connections).
pub const CONNECTIONS_PER_PEER: usize = 4;
/// HTTP/2 receive window of a stream (bytes): 1 MiB carries 8 Gbit/s at 1 ms of round trip.
pub const STREAM_WINDOW: u32 = 1 << 20;
/// HTTP/2 receive window of a connection (bytes): all its streams stalled together still leave room, so no stream can
/// stall another.
pub const CONNECTION_WINDOW: u32 = STREAM_WINDOW * (STREAMS_PER_CONNECTION + 1);
/// Largest HTTP/2 frame received (bytes).
pub const FRAME: u32 = 256 << 10;
/// Largest decoded header list received (bytes).
pub const HEADER_LIST: u32 = 16 << 10;
/// Bytes that a stream may have queued for sending (bytes).
pub const SEND_BUFFER: usize = 224 << 10;
/// Fields of a request (fields): HBONE has 4.
pub const HEADER_FIELDS: usize = 32;
/// CONTINUATION frames of one header block (frames): an honest block is one frame.
pub const H2_CONTINUATIONS: u32 = 4;
/// Encoded header block (bytes): twice what may come out of it. Encoders never make it larger, except on purpose.
pub const H2_HEADER_BLOCK: u32 = 2 * HEADER_LIST;
/// PING and SETTINGS frames of a connection, answers included (frames): a live peer pings every few seconds, an eager one
/// measures its round trip with some in a row.
pub const H2_PINGS: Rate = Rate::of(100, 10);
pub const H2_SETTINGS: Rate = Rate::of(100, 10);
/// Frames that HBONE has no use for (PRIORITY, GOAWAY, PUSH_PROMISE, extensions) of a connection (frames): some clients send a few.
pub const H2_OTHERS: Rate = Rate::of(100, 10);
/// RST_STREAM frames beyond one for each stream (frames): none is honest, but both sides may end a stream at once.
pub const H2_RESETS: Rate = Rate::of(200, 10);
/// WINDOW_UPDATE frames beyond those that answer data (frames), and bytes sent that earn one more (bytes): an eager peer answers
/// every frame with two, of its stream and of the connection, and the smallest frame of data is 10 bytes.
pub const H2_UPDATES: Rate = Rate { per_second: 1_000, burst: 10_000 };
pub const H2_BYTES_PER_UPDATE: usize = 5;
/// Streams that a peer identity gives up before they are answered (streams), over all its connections: rapid reset. A stream that
/// was answered and then reset counts as nothing: connections of apps end so, at any rate.
pub const H2_GIVEN_UP: Rate = Rate::of(200, 10);
/// Identities that this is counted of (identities); past it newcomers share one count.
pub const H2_GIVEN_UP_PEERS: usize = 4_096;
/// Streams reset by the peer that nobody has taken yet (streams): the whole of a connection's streams at most, before it ends.
pub const H2_PENDING_RESETS: usize = 20;
/// Streams that a peer's errors made us reset, in a connection's life (streams): an honest peer makes none; one that opens
/// streams before it has our settings makes a few.
pub const H2_ERROR_RESETS: usize = 200;
/// Streams that we reset and that are remembered, for frames on their way (streams).
pub const H2_REMEMBERED_RESETS: usize = 64;
/// Overhead of small DATA frames that wait to be taken (bytes: 256 less the frame's size, each): 130,000 frames of one
/// byte at once. Those that were taken count no more.
pub const H2_DATA_OVERHEAD: usize = 32 << 20;
/// How long a connection whose peer floods may take to hear of it (duration).
pub const H2_FAREWELL: Duration = Duration::from_secs(1);
/// HTTP/2 ping interval and how long its answer may take (duration): a dead peer is found within 15 s.
pub const PING_INTERVAL: Duration = Duration::from_secs(10);
pub const PING_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a pooled connection without streams is kept (duration).
pub const POOL_IDLE: Duration = Duration::from_secs(300);

/// Relay buffer per direction: first size, and the size it grows to while a connection moves bulk (bytes).
pub const RELAY_BUFFER_MIN: usize = 16 << 10;
pub const RELAY_BUFFER_MAX: usize = 256 << 10;

/// Tasks that a worker polls before it looks for sockets that became ready (polls). With the runtime's 61, a request of
/// one pod waits behind 61 turns of another's bulk, each of up to [`RELAY_BUFFER_MAX`].
pub const POLLS_BETWEEN_EVENTS: u32 = 8;
/// Listen backlog of each pod's listener (connections).
pub const LISTEN_BACKLOG: i32 = 4_096;
/// Bytes that one direction of a connection moves before other tasks get their turn (bytes): a tenth of a millisecond, so that
/// bulk holds up nobody's request.
pub const TURN: usize = 256 << 10;
/// Connections that the agent holds at a time, per pod (connections): every tunnel, every stream, every plaintext connection.
pub const CONNECTIONS_PER_POD: usize = 4_096;
/// Connections of every pod that no other can take (connections), while all of them together need at most half of the descriptors.
pub const CONNECTIONS_RESERVED: u64 = 64;
/// What a connection costs at most (descriptors): the client's socket and the app's or the endpoint's.
pub const DESCRIPTORS_PER_CONNECTION: u64 = 2;
/// What the agent keeps for itself (descriptors): runtime, logs, maps, CA, metrics, readiness, admin and their clients. A tenth of
/// RLIMIT_NOFILE if that is more; the rest is for traffic.
pub const DESCRIPTORS_OWN: u64 = 96 + ADMIN_REQUESTS as u64;
/// What an enrolled pod costs by itself (descriptors): its listener, its netns, its programs, links and maps.
pub const DESCRIPTORS_PER_POD: u64 = 16;
/// Accepted connections of a pod's tunnel port that have not authenticated (connections), beside those of
/// [`CONNECTIONS_PER_POD`]; at most half of the descriptors that pods share, at least the second. Past it the oldest goes.
pub const HALF_OPEN_PER_POD: usize = 6_000;
pub const HALF_OPEN_MIN: usize = 16;
/// TLS handshakes of a pod, inbound and outbound each (handshakes): one costs a core half a millisecond, so this is a
/// tenth of a core. Inbound ones past it are reset, outbound ones wait.
pub const HANDSHAKES: Rate = Rate { per_second: 200, burst: 400 };
/// Addresses of which a pod's handshakes are counted apart (addresses), per second; past it the rest shares what there is.
pub const HANDSHAKE_SOURCES: usize = 1_024;
/// Bytes queued in a pod's connections while the other side takes none (bytes): 64 connections whose whole window is full.
pub const BUFFERS_PER_POD: u64 = 64 << 20;
/// Those that no other pod can take (bytes), and the part of the agent's memory that all together may have (1 of so many).
pub const BUFFERS_RESERVED: u64 = 4 << 20;
pub const BUFFERS_OF_MEMORY: u64 = 4;
/// Memory that is reckoned with where the machine does not say (bytes).
pub const MEMORY_UNKNOWN: u64 = 512 << 20;
/// A connection's queue is counted from this on, in steps of the second (bytes).
pub const BUFFER_FREE: u64 = RELAY_BUFFER_MIN as u64;
pub const BUFFER_STEP: u64 = 64 << 10;
/// First buffer for what a peer sends before it is known (bytes): a ClientHello has 250 to 2,000 bytes.
pub const HELLO: usize = 512;
/// A connection on which neither side says anything for this long is closed (duration), and how often that is looked at.
pub const STREAM_IDLE: Duration = Duration::from_secs(3_600);
pub const STREAM_IDLE_LOOK: Duration = Duration::from_secs(60);
/// First and longest pause after a failed accept (duration): at the fd limit accept fails at once, and would spin.
pub const ACCEPT_PAUSE_MIN: Duration = Duration::from_millis(1);
pub const ACCEPT_PAUSE_MAX: Duration = Duration::from_millis(250);
/// Source ports that delivery tries before it gives up (ports).
pub const DELIVERY_TRIES: u32 = 64;
/// Endpoints of a Service that are tried before the connection fails (endpoints).
pub const ENDPOINT_TRIES: usize = 3;

/// Certificate fetches under way at a time (requests).
pub const FETCHES: usize = 8;
/// One CreateCertificate call (duration).
pub const FETCH: Duration = Duration::from_secs(5);
/// Backoff of failed fetches (duration), doubled each time, with jitter.
pub const FETCH_BACKOFF_MIN: Duration = Duration::from_millis(500);
pub const FETCH_BACKOFF_MAX: Duration = Duration::from_secs(30);

/// Largest manifest file (bytes), and most files in the directory (files).
pub const MANIFEST_BYTES: u64 = 4 << 20;
pub const MANIFEST_FILES: usize = 10_000;

/// Access-log lines that wait to be written (bytes), some ten thousand of them; past it lines are dropped and counted.
pub const LOG_QUEUE: usize = 8 << 20;
/// What is kept of the memory that a burst of lines took (bytes): the lines of [`LANE_RECORDS`] connections fit.
pub const LOG_KEPT: usize = 512 << 10;
/// How long the agent's end waits for the last lines to be written (duration).
pub const LOG_FLUSH: Duration = Duration::from_secs(1);
/// Access-log lines of refused and failed connections that carried nothing, for each pod and reason (lines per second);
/// beyond it they are counted: such connections cost their makers nothing.
pub const LOG_REFUSALS: u32 = 10;
/// Pods and reasons whose lines are counted apart (pairs): a node has some hundred pods; past it they share one count.
pub const LOG_WINDOWS: usize = 4_096;
/// Series of the connection metrics (series); past it events count under `overflow`. With those of denials, dry runs, pods
/// and the agent itself a scrape stays within 10,000.
pub const METRIC_SERIES: usize = 8_000;
/// Requests under way on the metrics, readiness and admin endpoints together (requests).
pub const ADMIN_REQUESTS: usize = 64;
/// How long a probe connection may take (duration).
pub const PROBE: Duration = Duration::from_secs(3);
/// How often the capture of every pod is proven again (duration).
pub const PROVE_INTERVAL: Duration = Duration::from_secs(30);

// capture

/// How often it is looked whether the kubelet is where it was (duration): for so long the probes of one that was started again in
/// a new cgroup are refused, and its shortest period is a second.
pub const KUBELET_LOOK: Duration = Duration::from_secs(1);
/// What starting the process of an outbound probe may take on top of [`PROBE`] (duration): a busy node starts it late.
pub const PROBE_START: Duration = Duration::from_secs(2);
/// One `heddle proof` in all (duration): what a connection may wait for, but no longer than an operator waits.
pub const PROOF: Duration = Duration::from_secs(9);
/// How long a connection that was made may take to come to the agent before it is taken to have gone past it (duration).
pub const PROOF_ARRIVAL: Duration = Duration::from_secs(1);
/// How long a proof that says something waits for the app's answer (duration).
pub const PROOF_ECHO: Duration = Duration::from_secs(1);
/// Longest text that a proof says (bytes).
pub const PROOF_SAY: usize = 1 << 10;
/// TCP keepalive of sockets that capture makes: idle time, interval (durations) and tries: a peer that vanished without a word
/// is found within 2 minutes, and its memory with it.
pub const KEEPALIVE_IDLE: Duration = Duration::from_secs(60);
pub const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(15);
pub const KEEPALIVE_TRIES: u32 = 4;

/// How long the kernel may take to say what it did with sockets of a pod (duration): it has when it is asked.
pub const SOCK_DIAG: Duration = Duration::from_secs(1);
/// Sockets that it is asked about at a time (sockets): the answers, of 1 to 2 KiB each in its accounts, fit the smallest usual
/// receive buffer of 212,992 bytes.
pub const SOCK_DIAG_BATCH: usize = 64;
/// Longest answer about one socket (bytes): some 200 without what is not asked for.
pub const SOCK_DIAG_ANSWER: usize = 4 << 10;

/// Room for one part of the kernel's answer about all sockets of a pod (bytes): it sends at most half as much at a time.
pub const SOCK_DIAG_DUMP: usize = 64 << 10;
/// Connections of a pod that are remembered as older than its enrolment (connections), and those of which a later agent learns: their
/// record is the target of a link, of at most 4,095 bytes.
pub const OLDER: usize = 4_096;
pub const OLDER_RECORDED: usize = 64;
/// Routes to a pod's own addresses that its table `main` has for a moment while it is enrolled (routes): a pod has two;
/// what is beyond may lose a packet then.
pub const OWN_ROUTES: usize = 256;

// cluster

/// Longest path that a pod's annotation asks its metrics of (bytes).
pub const SCRAPE_PATH: usize = 1 << 10;
/// What one pod may answer a scrape with: bytes, samples, labels of a sample, and the head of its answer (bytes). Large apps have
/// some thousand samples of 100 bytes.
pub const SCRAPE_BYTES_PER_POD: usize = 4 << 20;
pub const SCRAPE_SAMPLES_PER_POD: usize = 20_000;
pub const SCRAPE_LABELS: usize = 64;
pub const SCRAPE_HEAD: usize = 64 << 10;
/// What all pods of a node may in one scrape (bytes, samples): it is held in memory, twice for a moment.
pub const SCRAPE_BYTES: usize = 32 << 20;
pub const SCRAPE_SAMPLES: usize = 200_000;
/// Scrapes of all pods that are answered at a time (requests): those of two Prometheus servers. Others are told to come again.
pub const SCRAPES: usize = 2;
/// Pods of one scrape that are asked at a time (pods): each is a socket.
pub const SCRAPES_AT_A_TIME: usize = 64;
/// How long a scrape may take where Prometheus does not say, and at most (duration): less than [`ADMIN_CONNECTION`]. Of what it says,
/// this share.
pub const SCRAPE_DEFAULT: Duration = Duration::from_secs(10);
pub const SCRAPE_MAX: Duration = Duration::from_secs(12);
pub const SCRAPE_SHARE: f64 = 0.9;
/// Nesting and nodes of one YAML document (levels, nodes), aliases expanded: a full file of pods has some 250,000 nodes.
pub const MANIFEST_DEPTH: usize = 64;
pub const MANIFEST_NODES: usize = 1_000_000;
/// `List` kinds inside one another (levels).
pub const MANIFEST_LISTS: usize = 4;
/// The directory is read after this long without a change in it, at the latest after the second (duration): writers that
/// don't rename take several writes.
pub const MANIFEST_QUIET: Duration = Duration::from_millis(50);
pub const MANIFEST_QUIET_MAX: Duration = Duration::from_millis(500);
/// The same where files were only renamed into it or removed (duration): they are whole, and several renames of one change
/// follow each other within milliseconds. A revoked permission waits for it.
pub const MANIFEST_QUIET_WHOLE: Duration = Duration::from_millis(5);
/// The directory is looked at this often even when inotify says nothing (duration).
pub const MANIFEST_POLL: Duration = Duration::from_secs(2);
/// Objects of one kind of the API server that are kept (objects): Kubernetes is made for 150,000 pods. Of those that make no sense
/// as many are told of (objects).
pub const KUBE_OBJECTS: usize = 200_000;
pub const KUBE_FAULTS: usize = 1_000;
/// How long one page of a list may take (duration); a watch begins within [`KUBE_CALL`].
pub const KUBE_LIST: Duration = Duration::from_secs(30);
/// A watch of the agent (seconds), and up to half of it more, by lot: a thousand agents begin some twenty watches a second.
pub const KUBE_AGENT_WATCH: u32 = 280;
/// A watch that says nothing for this long, not even a bookmark, which comes every minute, is begun anew (duration): its
/// connection may be dead. Less than the client's own deadline, so that silence is no failure.
pub const KUBE_SILENCE: Duration = Duration::from_secs(KUBE_WATCH as u64 + 4);
/// Backoff of an API server that answers that it won't (duration), doubled each time, with jitter; the longest time that it may
/// ask for itself (duration).
pub const KUBE_BACKOFF_MIN: Duration = Duration::from_millis(500);
pub const KUBE_BACKOFF_MAX: Duration = Duration::from_secs(15);
pub const KUBE_RETRY_AFTER: Duration = Duration::from_secs(60);
/// While it can't be reached it is tried after this long, less up to half, by lot, and waited for this long (durations): it is
/// followed again within two seconds, for one connection attempt of each agent a second.
pub const KUBE_KNOCK: Duration = Duration::from_secs(1);
pub const KUBE_KNOCK_ANSWER: Duration = Duration::from_secs(2);
/// Where no watch has heard anything for this long, the API server is asked for its version (duration), and twice no answer means
/// that its connections are dead: what drops packets without a word is found within 20 s.
pub const KUBE_PULSE: Duration = Duration::from_secs(15);
/// How often a policy kind that is not there is looked for (duration), and how long policies that were known of it hold on
/// (duration): a server that has just started does not know its CRDs yet.
pub const KUBE_ABSENT_LOOK: Duration = Duration::from_secs(20);
pub const KUBE_ABSENT_HOLD: Duration = Duration::from_secs(60);
/// What the API server tells is put in force after this long without another change, or after this long where policies or
/// namespaces changed, and at the latest after the third (durations): a rollout changes a pod and its slices in one go.
pub const KUBE_QUIET: Duration = Duration::from_millis(20);
pub const KUBE_QUIET_POLICY: Duration = Duration::from_millis(5);
pub const KUBE_QUIET_MAX: Duration = Duration::from_millis(100);
/// After indexing the thread rests so many times as long as that took (times), at most the second (duration); as long where a
/// policy changed. So changes without end cost a fifth of a core.
pub const KUBE_INDEX_REST: u32 = 4;
pub const KUBE_INDEX_REST_MAX: Duration = Duration::from_secs(1);
/// The last good snapshot on disk: largest (bytes), oldest that is used (duration), between two writes of one that changed, of one
/// whose policies changed, and of one that did not (durations). A node's disk is not for logs of every pod's life.
pub const SAVED_BYTES: u64 = 256 << 20;
pub const SAVED_AGE: Duration = Duration::from_secs(24 * 3_600);
pub const SAVED_PAUSE: Duration = Duration::from_secs(10);
pub const SAVED_PAUSE_POLICY: Duration = Duration::from_secs(1);
pub const SAVED_AGAIN: Duration = Duration::from_secs(600);
/// How long an agent that starts waits for the API server before it decides by the last good snapshot (duration); less if that
/// says that it is away.
pub const SAVED_PATIENCE: Duration = Duration::from_secs(5);
/// `serviceAccounts` in one source of an AuthorizationPolicy (names), as Istio's API has it.
pub const SERVICE_ACCOUNTS: usize = 16;

/// Between two looks for the pods of this node, where nothing asks for one (duration), and while one is asked for that was not
/// found (duration): its runtime has not made it yet. A look costs some 10 µs a process.
pub const PLACES_POLL: Duration = Duration::from_secs(5);
pub const PLACES_POLL_MISSING: Duration = Duration::from_millis(500);
/// After a look (duration): pods that come together are looked for together.
pub const PLACES_PAUSE: Duration = Duration::from_millis(20);
/// Processes that one look takes in (processes), cgroups in which no process of a pod is yet (folders), and how deep they may be
/// (levels): a kubelet within a kubelet has its pods at the seventh.
pub const PLACES_PROCESSES: usize = 131_072;
pub const PLACES_FOLDERS: usize = 32_768;
pub const PLACES_DEPTH: usize = 8;
/// How long no process may be seen of a pod that was announced, and had one, until it is taken for gone (duration). The plugin says so at
/// once; a look may come between a process that ends and its successor.
pub const PLACES_GONE: Duration = Duration::from_secs(15);
/// Pods whose network was made and in which nothing was seen to run (pods), each an open file, and how long they are believed to
/// start yet (duration).
pub const PLACES_ANNOUNCED: usize = 512;
pub const PLACES_ANNOUNCED_AGE: Duration = Duration::from_secs(600);

// CNI

/// How long the plugin waits for the agent (duration), unless its entry says otherwise: kubelet tries again after it.
pub const CNI_WAIT: Duration = Duration::from_secs(10);
/// Longest wait that an entry may ask for (duration): a runtime gives up after two minutes.
pub const CNI_WAIT_MAX: Duration = Duration::from_secs(90);
/// How much earlier than the plugin the agent gives up (duration), so that its answer still arrives.
pub const CNI_MARGIN: Duration = Duration::from_millis(500);
/// Longest message between plugin and agent (bytes), longest configuration that a runtime may hand to the plugin (bytes).
pub const CNI_MESSAGE: usize = 64 << 10;
pub const CNI_STDIN: usize = 4 << 20;
/// From an accepted connection of the plugin to its complete question (duration).
pub const CNI_QUESTION: Duration = Duration::from_secs(2);
/// Questions under way (requests): kubelet starts a node's pods all at once. Others are told to try again.
pub const CNI_REQUESTS: usize = 512;
/// Largest file of the node's CNI configuration (bytes), and most files that are looked at (files).
pub const CNI_LIST: u64 = 1 << 20;
pub const CNI_LISTS: usize = 256;
/// The plugin is compared with what is installed by so much at a time (bytes).
pub const CNI_COPY: usize = 64 << 10;
/// The node's CNI configuration is looked at this often even when inotify says nothing (duration).
pub const CNI_POLL: Duration = Duration::from_secs(5);
/// After a change of it (duration): a CNI that writes its list takes several steps.
pub const CNI_QUIET: Duration = Duration::from_millis(50);
/// Largest file of what is known of enrolment (bytes): some 100,000 namespaces.
pub const CNI_KNOWN: u64 = 16 << 20;

// identity

/// Trust bundle file: largest (bytes), and how often it and the wall clock are looked at (duration).
pub const BUNDLE_BYTES: u64 = 1 << 20;
pub const BUNDLE_POLL: Duration = Duration::from_secs(2);
/// Revocation lists: their file at most (bytes; some 200,000 entries), lists and issuers in it (each), and how often it is
/// looked at whether the file was replaced (duration): what a revoked peer has open ends within half a second.
pub const CRL_BYTES: u64 = 8 << 20;
pub const CRLS: usize = 64;
pub const CRL_LOOK: Duration = Duration::from_millis(50);
/// Trust domains that mean ours (names).
pub const TRUST_DOMAIN_ALIASES: usize = 16;
/// Largest bearer token file (bytes).
pub const TOKEN_BYTES: u64 = 64 << 10;
/// Certificates in the CA's answer (certificates): a leaf, some intermediates, the roots of a rotation.
pub const CHAIN_CERTIFICATES: usize = 16;
/// First pause after a CA's answer that is of no use (duration), before jitter: the CA's clock, root or policy differs from
/// ours, and asking again soon changes nothing.
pub const FETCH_UNUSABLE_MIN: Duration = Duration::from_secs(15);
/// Longest pause between the beginnings of two probes of a CA that can't be reached (duration), before jitter: a certificate is
/// renewed within 5 s of its return.
pub const CA_PROBE_MAX: Duration = Duration::from_secs(3);
/// Probes that wait for an answer at a time (requests): one lasts longer than the pause, where the CA is silent.
pub const CA_PROBES: usize = 2;
/// After an outage the identities that wait are spread over this much each, and this much together (duration).
pub const RECOVERY_STEP: Duration = Duration::from_millis(25);
pub const RECOVERY_SPREAD_MAX: Duration = Duration::from_secs(12);
/// Shortest time between two fetches of one identity that both worked (duration): an eighth of what the certificate lasts, but
/// neither more nor less than this. A clock that jumps, or a CA with absurd lifetimes, makes no storm.
pub const RENEWAL_PAUSE: Duration = Duration::from_secs(10);
pub const RENEWAL_PAUSE_MIN: Duration = Duration::from_secs(1);
/// From how long before the end of a root or intermediate on `heddle check` warns (duration): a rotation of roots takes people days.
pub const ISSUER_WARNING: Duration = Duration::from_secs(30 * 24 * 3_600);
/// Largest certificate request and largest gRPC request around it (bytes). A P-256 request is 400 bytes.
pub const CSR_BYTES: usize = 8 << 10;
pub const CA_REQUEST_BYTES: usize = 16 << 10;
/// Largest answer of a CA (bytes).
pub const CA_ANSWER_BYTES: usize = 256 << 10;
/// Connections that the CA holds at a time (connections), and requests under way on each (requests).
pub const CA_CONNECTIONS: usize = 1_024;
pub const CA_STREAMS: u32 = 32;
/// How long the CA takes for one request at most, and to finish those under way when it stops (duration).
pub const CA_REQUEST: Duration = Duration::from_secs(5);
pub const CA_DRAIN: Duration = Duration::from_secs(5);
/// How often files of a signing key are looked at, and where they can't be signed with, how long after the first look at the start the
/// second comes (duration): they are replaced one after the other.
pub const KEY_LOOK: Duration = Duration::from_secs(2);
pub const KEY_SETTLE: Duration = Duration::from_millis(500);
/// How often the published trust bundle file is looked at (duration), and how often those of all namespaces (duration): two lists.
pub const PUBLISH_LOOK: Duration = Duration::from_secs(2);
pub const CONFIG_MAP_LOOK: Duration = Duration::from_secs(10);
/// How often policies are looked at whose status may have to be written (duration): two lists.
pub const POLICY_STATUS_LOOK: Duration = Duration::from_secs(10);
/// One call to the API server (duration), and objects in one page of a list (objects).
pub const KUBE_CALL: Duration = Duration::from_secs(5);
pub const KUBE_PAGE: u32 = 500;
/// One watch of the API server (seconds): a connection that went dead without a word is found some seconds after.
pub const KUBE_WATCH: u32 = 60;
/// How long the Lease of the replica that publishes holds without being renewed, and how often it is renewed (duration): two
/// renewals may fail.
pub const LEASE: Duration = Duration::from_secs(15);
pub const LEASE_RENEW: Duration = Duration::from_secs(5);
/// How long an agent may take to answer `heddle ca rotate`, how often one that waits asks again (duration), how many are asked at a
/// time (agents), and the longest answer (bytes): four times what an agent with every series has.
pub const AGENT_ASK: Duration = Duration::from_secs(5);
pub const ROTATE_LOOK: Duration = Duration::from_secs(1);
pub const AGENTS_ASKED: usize = 16;
pub const AGENT_METRICS: usize = 32 << 20;
/// What may be found out about one caller of the CA (duration): review, pod and identity, all from the API server at worst.
/// Less than a node waits for its certificate, so that it hears of an API server that is away.
pub const CA_AUTHORIZE: Duration = Duration::from_secs(4);
/// How long the CA takes to refuse (duration), in steps: who is refused does not learn after which question.
pub const CA_REFUSAL: Duration = Duration::from_millis(100);
/// How long the API server's word on a good token and on a bad one holds (duration), and how many are kept (tokens): a token a node,
/// a second one while it is renewed, and 10,000 nodes.
pub const CA_REVIEW: Duration = Duration::from_secs(10);
pub const CA_REVIEW_REFUSED: Duration = Duration::from_secs(2);
pub const CA_REVIEWS: usize = 32_768;
/// Questions to the API server under way at a time (requests), of reviews and of pods each.
pub const CA_QUESTIONS: usize = 32;
/// Pods asked for directly, because the watch has not told of them yet, of one node (questions).
pub const CA_QUESTIONS_PER_NODE: Rate = Rate { per_second: 5, burst: 100 };
/// Pods in the answer to one such question (pods): those of one service account on one node that have not finished.
pub const CA_PODS_ASKED: u32 = 200;
/// Pods that the CA knows by its watch (pods): Kubernetes is made for 150,000. Others are asked for directly.
pub const CA_PODS: usize = 200_000;
/// For how long what the watch of the pods said last is taken for the present state (duration), and how many pods are remembered
/// that the API server was asked for after that (pods): each holds as long. A watch whose connection is dead is silent, like one of
/// a cluster where nothing happens; past this, an identity costs one question for its pod.
pub const CA_WATCH_WORD: Duration = Duration::from_secs(5);
pub const CA_PODS_CONFIRMED: usize = 65_536;
/// How long one page of the list of all pods may take (duration).
pub const CA_LIST: Duration = Duration::from_secs(30);
/// Backoff of a watch that failed (duration), doubled each time, with jitter.
pub const CA_WATCH_BACKOFF_MIN: Duration = Duration::from_millis(500);
pub const CA_WATCH_BACKOFF_MAX: Duration = Duration::from_secs(15);
/// Identities that a node asks for and has not had within a certificate's lifetime (identities): 60 a minute, and all the pods of a
/// large node at once when its agent is new.
pub const CA_NEW_IDENTITIES: Rate = Rate { per_second: 1, burst: 256 };
/// Certificates for one node (certificates): some hundred identities, each anew as often as an agent restarts.
pub const CA_CERTIFICATES_PER_NODE: Rate = Rate { per_second: 20, burst: 1_000 };
/// How long a node that asks for nothing is remembered at least (duration): by then it has all of that again.
pub const CA_NODE_MEMORY: Duration = Duration::from_secs(600);
/// Nodes of which that is counted (nodes), and identities remembered of each (identities); past them the oldest are forgotten.
pub const CA_NODES: usize = 16_384;
pub const CA_IDENTITIES_PER_NODE: usize = 1_024;
/// Public keys that were signed within a certificate's longest lifetime (keys), 150 bytes each: those of 100,000 pods with a
/// service account each that renew at half of it, with room. Past it the oldest are forgotten.
pub const CA_KEYS: usize = 400_000;
/// How far a certificate is backdated for nodes whose clock is slow (duration); a tenth of its lifetime if that is less.
pub const CLOCK_SKEW: Duration = Duration::from_secs(120);
/// Lifetime of the CA's own TLS certificate (duration); it renews itself at half of it.
pub const CA_TLS_LIFETIME: Duration = Duration::from_secs(24 * 3_600);

// tunnel

/// Connections that the pool opens to one peer at most (connections): enough for [`CONNECTIONS_PER_POD`] streams, so
/// that only a pod that is at its own cap ever meets it.
pub const CONNECTIONS_PER_PEER_MAX: usize = CONNECTIONS_PER_POD / STREAMS_PER_CONNECTION as usize;
/// A pooled connection takes no new stream after this (duration): a certificate lives an hour, and no new stream rides
/// one that has ended.
pub const TUNNEL_AGE: Duration = Duration::from_secs(50 * 60);
/// The answering side asks its peer to move on (GOAWAY) after this (duration): the peer's certificate has ended by then.
pub const TUNNEL_AGE_ANSWER: Duration = Duration::from_secs(60 * 60);
/// A connection of which some stream waits for room while no stream gets any for this long takes no new stream
/// (duration): a peer's connection window may be smaller than the sum of its stream windows.
pub const CONGESTED_AFTER: Duration = Duration::from_millis(50);
/// How often one connection attempt may meet a pooled connection that is going away before it fails (times).
pub const STALE_TUNNELS: usize = 8;
/// Reads of at most this much are copied out of the relay buffer, so that a queued small message does not hold a whole
/// buffer (bytes).
pub const RELAY_COPY: usize = 2 << 10;
/// Pieces that one vectored write to an app takes at most (pieces): beyond it the system call dominates no more.
pub const RELAY_PIECES: usize = 64;
/// How often a relay that can't read looks whether its socket was reset (duration).
pub const RELAY_LOOK: Duration = Duration::from_secs(2);
/// One read of a TLS connection: first size, and the size it grows to while a connection moves bulk (bytes): rustls alone
/// asks the kernel for 4 KiB at a time.
pub const TLS_READ_MIN: usize = 4 << 10;
pub const TLS_READ: usize = 64 << 10;
/// Plaintext that a TLS connection holds for writing at most (bytes): one large frame at a time.
pub const TLS_WRITE: usize = 256 << 10;
/// Failed accepts and refused connections are logged at most this often per pod (duration).
pub const ACCEPT_LOG: Duration = Duration::from_secs(1);

/// Longest answer of a far agent that is asked what it saw of a connection (bytes): two SPIFFE ids, a policy's name, three
/// programs and words are well below half of it.
pub const PROOF_ANSWER: usize = 4 << 10;

// telemetry and life

/// Label sets of gone workloads are forgotten after this long without an event (duration): two missed scrapes at the
/// slowest interval that is usual.
pub const METRIC_IDLE: Duration = Duration::from_secs(600);
/// How often they are looked for (duration).
pub const METRIC_SWEEP: Duration = Duration::from_secs(60);
/// Pairs of reason and policy in the metric of denials, and of action and policy in that of dry runs (series); past it the
/// policy is `overflow`.
pub const METRIC_DENIALS: usize = 500;
/// TCP's state of a tunnel is asked for at most this often (duration): a system call that no byte waits for.
pub const TCP_HEALTH: Duration = Duration::from_secs(1);
/// Between two looks at the records of ended kernel-lane connections, where their ring does not ask for one (duration): it holds
/// 13,000 of them.
pub const LANE_RECORDS_LOOK: Duration = Duration::from_millis(100);
/// The same while there is more than [`LANE_RECORDS`] to tell (duration): the lines of few connections find the same memory
/// again, and it stays in the CPU's cache.
pub const LANE_RECORDS_BUSY: Duration = Duration::from_millis(20);
/// Records that are told of at a time (records): a scrape and the command line wait for as many, and their lines (80 KiB) stay in
/// the CPU's cache until they are written.
pub const LANE_RECORDS: usize = 64;
/// Between two looks at the kernel-lane connections that go on (duration).
pub const LANE_LOOK: Duration = Duration::from_secs(1);
/// Looks in a row at which a connection is missing from the kernel's table, without a record of its end, until it is
/// told as ended (looks): the record comes a moment after it has left the table.
pub const LANE_MISSING: u32 = 2;
/// How long a pod that has left is known to the records of its last connections, and the reason of a connection that policy
/// closes (duration).
pub const LANE_REMEMBERED: Duration = Duration::from_secs(60);
/// Pairs of pods, ports and Services whose labels and log lines are kept made up (pairs), some 5 KiB each; past it they are
/// made anew.
pub const LANE_ALIKE: usize = 2_048;
/// A dry-run policy that matches is logged at most this often (duration), and counted always.
pub const DRY_RUN_LOG: Duration = Duration::from_secs(1);
/// Spans queued for the collector (spans), some 2 KiB each; past it spans are dropped and counted.
pub const SPANS_QUEUED: usize = 2_048;
/// Spans sent at a time at most (spans), and how long the first of them waits for others (duration).
pub const SPANS_BATCH: usize = 512;
pub const SPAN_DELAY: Duration = Duration::from_secs(1);
/// One request to the collector, connecting and trying again included (duration).
pub const SPAN_EXPORT: Duration = Duration::from_secs(5);
/// How long the agent's end waits for the last spans to be sent (duration).
pub const SPAN_FLUSH: Duration = Duration::from_secs(1);
/// Longest error text in an access-log line (bytes).
pub const LOG_DETAIL: usize = 512;
/// Lines of the agent's own log queued for writing (lines); past it lines are dropped.
pub const OWN_LOG_LINES: usize = 10_000;
/// From an accepted connection on the metrics, readiness or admin endpoint to its complete request head (duration).
pub const ADMIN_HEAD: Duration = Duration::from_secs(3);
/// Longest life of such a connection (duration): a scrape of every series over a slow link takes seconds.
pub const ADMIN_CONNECTION: Duration = Duration::from_secs(15);
/// Longest answer that the command line reads from the agent (bytes), and how long it waits for it (duration).
pub const ADMIN_ANSWER: usize = 256 << 20;
pub const ADMIN_ANSWER_WAIT: Duration = Duration::from_secs(10);
/// Pods whose programs are loaded or proven at a time (pods): loading is CPU work of milliseconds, probing waits.
pub const ENROLMENTS: usize = 16;
/// One step of an enrolment: load, prove, withdraw or write the destinations (duration).
pub const ENROL_STEP: Duration = Duration::from_secs(20);
/// Backoff of a pod that could not be enrolled and of failed steps (duration), doubled each time, with jitter.
pub const ENROL_BACKOFF_MIN: Duration = Duration::from_millis(500);
pub const ENROL_BACKOFF_MAX: Duration = Duration::from_secs(30);
/// How often drain and readiness look at what they wait for (duration).
pub const WATCH_INTERVAL: Duration = Duration::from_millis(50);
/// How long cut connections may take to tell of their end before the agent exits (duration).
pub const CUT_WAIT: Duration = Duration::from_secs(1);
/// How long a pod that leaves the mesh is left alone before its routes go (duration): connections that were accepted just
/// before are on their way to the list of carried ones.
pub const LEAVE_SETTLE: Duration = Duration::from_secs(1);
/// How often it is looked whether a pod that leaves still has carried connections (duration).
pub const LEAVE_LOOK: Duration = Duration::from_millis(500);
/// Connections that wait at a socket which is there for one of them (connections): the pod's own processes may send others.
pub const PATH_BACKLOG: i32 = 16;
/// Pairs of pods and ports that the kernel lane remembers (pairs): as many as the kernel's table holds.
pub const LANE_PAIRS: usize = heddle_common::MAX_VERDICTS as usize;
/// Those of one source (pairs): a pod that tries every port of every pod drives out only its own.
pub const LANE_PAIRS_PER_SOURCE: usize = LANE_PAIRS / 16;
/// Denied pairs of one source that the kernel counts and answers by itself (pairs); the agent denies the others.
pub const LANE_DENIALS_PER_SOURCE: usize = heddle_common::MAX_DENIALS as usize / 16;
/// Connections without a verdict that wait to be learnt from (connections). One that finds no room is as good as the next.
pub const LANE_MISSES: usize = 4_096;
/// How many are learnt from at a time (connections): the table is locked meanwhile.
pub const LANE_BATCH: usize = 256;
/// Paths between two pods that are remembered, shown to be straight or not (paths).
pub const LANE_PATHS: usize = 65_536;
/// Paths that are proven at a time (paths), and how long one may take (duration).
pub const LANE_PROOFS: usize = 8;
pub const LANE_PROOF: Duration = Duration::from_secs(5);
/// When a path that could not be proven is tried again, if it is missed (duration), doubled each time: while a neighbour's old link address
/// is still believed, nothing arrives for some seconds.
pub const LANE_PATH_RETRY_MIN: Duration = Duration::from_secs(1);
pub const LANE_PATH_RETRY_MAX: Duration = Duration::from_secs(60);
/// How often the kernel's counts of denied connections are read (duration), while there are any.
pub const LANE_POLL: Duration = Duration::from_secs(1);
/// How long closing the lane's connections may take (duration): thousands take milliseconds.
pub const LANE_DESTROY: Duration = Duration::from_secs(5);
/// How often it is looked whether there is something to tell the API server of the node (duration), and one call to it.
pub const NODE_LOOK: Duration = Duration::from_secs(1);
pub const NODE_CALL: Duration = Duration::from_secs(5);
/// How long the agent is not ready before its node's taint is put on again (duration), where that is asked for, and how often a ready
/// agent looks whether somebody else put it on.
pub const NODE_TAINT_AFTER: Duration = Duration::from_secs(10);
pub const NODE_TAINT_LOOK: Duration = Duration::from_secs(300);
/// How long a pod is uncaptured before an event says so (duration): those that start are, for a moment. The same reason is told again
/// after the second.
pub const EVENT_AFTER: Duration = Duration::from_secs(10);
pub const EVENT_AGAIN: Duration = Duration::from_secs(600);
/// Events on pods of a node (events): what clients of Kubernetes allow themselves at once, and a steady trickle.
pub const EVENTS: Rate = Rate { per_second: 1, burst: 25 };
/// Longest note of an event (bytes), as the API server has it.
pub const EVENT_NOTE: usize = 1_024;
