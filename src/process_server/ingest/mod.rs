//! Accepts agents on 9443: TLS 1.3 with certificates both ways, bounded handshakes.

mod connection;

use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;

use super::server::Server;
use crate::config::limits::{HANDSHAKE_SECONDS, HANDSHAKES_MAX};
use crate::crypto::pki::Role;
use crate::crypto::tls::{ALPN_INGEST, peer_identity};
use crate::observe::metrics;

/// Of one machine: its agent has one, and those that are not noticed as dead yet.
const CONNECTIONS_PER_MACHINE_MAX: usize = 16;

/// Listens for agents.
///
/// # Errors
/// Names the address and the key to change.
pub async fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    TcpListener::bind(address).await.map_err(|e| {
        io::Error::new(
            e.kind(),
            format!("cannot listen on {address} for agents: {e}; stop the program that uses the port or change [ingest] listen"),
        )
    })
}

/// Accepts until the process ends.
pub async fn accept(server: Rc<Server>, listener: TcpListener) {
    let config = match server.credentials.server(ALPN_INGEST) {
        Ok(config) => Arc::new(config),
        Err(error) => return tracing::error!(%error, "certificates cannot be used"),
    };
    let acceptor = TlsAcceptor::from(config);
    let handshakes = Arc::new(Semaphore::new(HANDSHAKES_MAX));
    loop {
        let Ok(permit) = handshakes.clone().acquire_owned().await else { return };
        let (tcp, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of descriptors, most likely: those who are connected go on.
                tracing::warn!(%error, "could not accept an agent");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        if server.agents.get() >= server.settings.ingest.connections_max {
            metrics::count_reason(metrics::REFUSED, "too-many-connections");
            continue;
        }
        let (server, acceptor) = (server.clone(), acceptor.clone());
        tokio::task::spawn_local(async move {
            let shake = tokio::time::timeout(Duration::from_secs(HANDSHAKE_SECONDS), handshake(&acceptor, tcp)).await;
            drop(permit);
            match shake {
                Ok(Ok((tls, machine))) => {
                    let ours = server.connections.borrow().get(&machine).copied().unwrap_or(0);
                    if ours >= CONNECTIONS_PER_MACHINE_MAX {
                        return metrics::count_reason(metrics::REFUSED, "too-many-connections");
                    }
                    server.connections.borrow_mut().insert(machine.clone(), ours + 1);
                    server.agents.set(server.agents.get() + 1);
                    connection::serve(server.clone(), tls, &machine, peer).await;
                    server.agents.set(server.agents.get() - 1);
                    let mut connections = server.connections.borrow_mut();
                    match connections.get_mut(&machine) {
                        Some(count) if *count > 1 => *count -= 1,
                        _ => drop(connections.remove(&machine)),
                    }
                }
                Ok(Err(error)) => {
                    metrics::count_reason(metrics::REFUSED, "handshake");
                    tracing::info!(%peer, %error, "refused a connection on the agents' port");
                }
                Err(_) => metrics::count_reason(metrics::REFUSED, "handshake-timeout"),
            }
        });
    }
}

type Agent = (tokio_rustls::server::TlsStream<TcpStream>, crate::model::Name);

async fn handshake(acceptor: &TlsAcceptor, tcp: TcpStream) -> io::Result<Agent> {
    tcp.set_nodelay(true)?;
    let mut tls = acceptor.accept(tcp).await?;
    let identity = peer_identity(tls.get_ref().1.peer_certificates(), Role::Agent).map_err(io::Error::other)?;
    tls.get_mut().1.set_buffer_limit(Some(1 << 20));
    Ok((tls, identity.name))
}
