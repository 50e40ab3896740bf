//! QUIC endpoints with our certificates and the settings that measurements asked for.
//!
//! quinn sends up to ten segments in one call; ten segments above 6553 bytes exceed 64 KiB, the kernel refuses them,
//! and quinn takes the loss for a black hole. So the socket is wrapped and the number of segments capped by the MTU:
//! 850 MB/s become 4450 on a jumbo path.

use std::fmt;
use std::io::{self, IoSliceMut};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::crypto::{CryptoError, HmacKey};
use quinn::udp::{RecvMeta, Transmit};
use quinn::{
    AsyncUdpSocket, ClientConfig, ConnectionId, ConnectionIdGenerator, Endpoint, EndpointConfig, IdleTimeout, MtuDiscoveryConfig, Runtime,
    ServerConfig, TokioRuntime, TransportConfig, UdpPoller, VarInt,
};

use super::tls::{ALPN_FORWARD, Credentials, TlsError};
use crate::config::limits::SILENCE_SECONDS;

/// Streams of one connection: a disk each.
const STREAMS_MAX: u32 = 4096;
/// Socket buffers asked of the kernel.
const SOCKET_BUFFER: usize = 4 << 20;
/// Congestion window to begin with: the link is ours or shaped, slow start over it costs a second.
const INITIAL_WINDOW: u64 = 1 << 20;

/// Listens for process servers.
///
/// # Errors
/// Names the address; [`TlsError`] as an `io::Error`.
pub fn server(credentials: &Credentials, address: SocketAddr, mtu: u16, window: u64) -> io::Result<Endpoint> {
    let tls = QuicServerConfig::try_from(credentials.server(ALPN_FORWARD).map_err(io::Error::other)?).map_err(io::Error::other)?;
    let mut config = ServerConfig::with_crypto(Arc::new(tls));
    config.transport_config(Arc::new(transport(mtu, window)));
    config.migration(false);
    config.max_incoming(256);
    let hint = |e: io::Error| {
        io::Error::new(
            e.kind(),
            format!("cannot listen on udp {address}: {e}; stop the program that uses the port or change [receive] listen"),
        )
    };
    endpoint(address, mtu, Some((config, credentials.derived(RESET_PURPOSE)))).map_err(hint)
}

/// An endpoint that connects to master targets.
///
/// # Errors
/// Those of the socket; [`TlsError`] as an `io::Error`.
pub fn client(credentials: &Credentials, mtu: u16, window: u64, ipv6: bool) -> io::Result<Endpoint> {
    let any = if ipv6 { SocketAddr::from(([0u16; 8], 0)) } else { SocketAddr::from(([0, 0, 0, 0], 0)) };
    let mut endpoint = endpoint(any, mtu, None)?;
    let tls = credentials.client(ALPN_FORWARD).map_err(|e: TlsError| io::Error::other(e))?;
    let tls = QuicClientConfig::try_from(tls).map_err(io::Error::other)?;
    let mut config = ClientConfig::new(Arc::new(tls));
    config.transport_config(Arc::new(transport(mtu, window)));
    endpoint.set_default_client_config(config);
    Ok(endpoint)
}

/// Bytes of datagrams that are kept. Nobody reads them: they are sent for the acknowledgement that they draw, see [`probe`].
const PROBE_BUFFER: usize = 256;

/// Asks the other side for a sign that it hears us: a datagram of one byte, whose acknowledgement is a sample of the round-trip
/// time. The keep-alives do not, on either side alone: what is received puts off one's own.
pub fn probe(connection: &quinn::Connection) -> bool {
    connection.send_datagram(bytes::Bytes::from_static(&[0])).is_ok()
}

fn transport(mtu: u16, window: u64) -> TransportConfig {
    let mut transport = TransportConfig::default();
    let stream_window = (window / 2).max(4 << 20);
    let mut discovery = MtuDiscoveryConfig::default();
    discovery.upper_bound(mtu);
    let mut congestion = quinn::congestion::CubicConfig::default();
    congestion.initial_window(INITIAL_WINDOW);
    transport
        .max_concurrent_bidi_streams(VarInt::from_u32(STREAMS_MAX))
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .datagram_receive_buffer_size(Some(PROBE_BUFFER))
        .stream_receive_window(VarInt::from_u64(stream_window).unwrap_or(VarInt::MAX))
        .receive_window(VarInt::from_u64(window).unwrap_or(VarInt::MAX))
        .send_window((window / 2).max(4 << 20))
        .send_fairness(true)
        .mtu_discovery_config(Some(discovery))
        .congestion_controller_factory(Arc::new(congestion))
        .keep_alive_interval(Some(Duration::from_secs(2)))
        .max_idle_timeout(Some(IdleTimeout::from(VarInt::from_u32(SILENCE_SECONDS as u32 * 1000))));
    transport
}

fn endpoint(address: SocketAddr, mtu: u16, server: Option<(ServerConfig, [u8; 32])>) -> io::Result<Endpoint> {
    let socket = std::net::UdpSocket::bind(address)?;
    // Smaller buffers work too, only slower; the kernel may cap them (net.core.rmem_max).
    let _ = rustix::net::sockopt::set_socket_recv_buffer_size(&socket, SOCKET_BUFFER);
    let _ = rustix::net::sockopt::set_socket_send_buffer_size(&socket, SOCKET_BUFFER);
    socket.set_nonblocking(true)?;
    let mut config = EndpointConfig::default();
    config.max_udp_payload_size(mtu.max(1200)).map_err(io::Error::other)?;
    let server = server.map(|(server, secret)| {
        config.reset_key(Arc::new(ResetKey(secret))).cid_generator(|| Box::new(RandomIds));
        server
    });
    let runtime = Arc::new(TokioRuntime);
    let inner = runtime.wrap_udp_socket(socket)?;
    let capped = Arc::new(CappedSocket { inner, mtu: usize::from(mtu) });
    Endpoint::new_with_abstract_socket(config, server, capped, runtime)
}

/// What a derived secret is for.
const RESET_PURPOSE: &str = "tidegate 2026-11 QUIC stateless reset";

/// Proves to a client that this server is the one that it speaks with and has forgotten it, because it was restarted: the client
/// connects again at once instead of after the time that silence is allowed to last (RFC 9000, 10.3). So it must be the same
/// after a restart.
struct ResetKey([u8; 32]);

impl HmacKey for ResetKey {
    fn sign(&self, data: &[u8], signature_out: &mut [u8]) {
        blake3::Hasher::new_keyed(&self.0).update(data).finalize_xof().fill(signature_out);
    }

    fn signature_len(&self) -> usize {
        32
    }

    fn verify(&self, data: &[u8], signature: &[u8]) -> Result<(), CryptoError> {
        let mut expected = vec![0; signature.len()];
        self.sign(data, &mut expected);
        let differs = expected.iter().zip(signature).fold(0, |sum, (a, b)| sum | (a ^ b));
        if differs == 0 && signature.len() == self.signature_len() { Ok(()) } else { Err(CryptoError) }
    }
}

/// Any id may be one that was given before a restart, and is answered with a reset; quinn's own generator knows only those that
/// this process gave.
struct RandomIds;

impl ConnectionIdGenerator for RandomIds {
    fn generate_cid(&mut self) -> ConnectionId {
        ConnectionId::new(&crate::storage::log::random_u64().to_le_bytes())
    }

    fn cid_len(&self) -> usize {
        8
    }

    fn cid_lifetime(&self) -> Option<Duration> {
        None
    }
}

/// A socket that never sends or receives more segments at once than fit 64 KiB.
struct CappedSocket {
    inner: Arc<dyn AsyncUdpSocket>,
    mtu: usize,
}

impl fmt::Debug for CappedSocket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CappedSocket").field("mtu", &self.mtu).finish()
    }
}

impl AsyncUdpSocket for CappedSocket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        self.inner.clone().create_io_poller()
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        self.inner.try_send(transmit)
    }

    fn poll_recv(&self, cx: &mut Context<'_>, bufs: &mut [IoSliceMut<'_>], meta: &mut [RecvMeta]) -> Poll<io::Result<usize>> {
        self.inner.poll_recv(cx, bufs, meta)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.inner.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        self.inner.max_transmit_segments().min(65_000 / self.mtu).max(1)
    }

    fn max_receive_segments(&self) -> usize {
        self.inner.max_receive_segments().min(65_536usize.div_ceil(self.mtu)).max(1)
    }

    fn may_fragment(&self) -> bool {
        self.inner.may_fragment()
    }
}
