//! The link to the master target: one QUIC connection, one stream for each disk, so that no disk waits for another.

mod stream;

use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::PoisonError;
use std::time::Duration;

use tokio::task::JoinSet;

use super::server::Server;
use crate::clock;
use crate::config::limits::{HANDSHAKE_SECONDS, SILENCE_SECONDS};
use crate::crypto::pki::Role;
use crate::crypto::{quic, tls};
use crate::observe::metrics;

const BACKOFF_FIRST: Duration = Duration::from_millis(100);
const BACKOFF_MAX: Duration = Duration::from_secs(5);

/// Connects and reconnects until the process ends.
pub async fn run(server: Rc<Server>) {
    let mut backoff = BACKOFF_FIRST;
    let mut told = String::new();
    loop {
        let started = clock::now();
        let error = match connect(&server).await {
            Ok((endpoint, connection)) => {
                tracing::info!(address = server.settings.forward.master_target, "connected to the master target");
                told.clear();
                set_link(&server, None);
                let reason = serve(&server, &connection).await;
                drop(endpoint);
                format!("connection to the master target ended: {reason}")
            }
            Err(error) => error,
        };
        set_link(&server, Some(&error));
        if error != told {
            tracing::warn!(error, "not connected to the master target; changes stay in the cache");
            told.clone_from(&error);
        }
        backoff = if clock::now().since(started) > Duration::from_secs(10) { BACKOFF_FIRST } else { (backoff * 2).min(BACKOFF_MAX) };
        tokio::time::sleep(backoff).await;
    }
}

fn set_link(server: &Server, error: Option<&str>) {
    server.link_up.set(error.is_none());
    server.disks.values().for_each(|disk| disk.tell_agent());
    metrics::disk_gauge(metrics::LINK_UP, "", if error.is_none() { 1.0 } else { 0.0 });
    let mut view = server.view.lock().unwrap_or_else(PoisonError::into_inner);
    view.link_up = error.is_none();
    view.link_error = error.map(str::to_owned);
}

async fn connect(server: &Server) -> Result<(quinn::Endpoint, quinn::Connection), String> {
    let settings = &server.settings.forward;
    let target = &settings.master_target;
    let mut found = tokio::net::lookup_host(target).await.map_err(|e| format!("cannot resolve the master target {target}: {e}"))?;
    let address: SocketAddr = found.next().ok_or_else(|| format!("the master target {target} has no address"))?;
    let endpoint = quic::client(&server.credentials, settings.mtu, settings.window, address.is_ipv6())
        .map_err(|e| format!("cannot open a UDP socket: {e}"))?;
    let attempt = endpoint.connect(address, &Role::MasterTarget.server_name()).map_err(|e| e.to_string())?;
    let connection = match tokio::time::timeout(Duration::from_secs(HANDSHAKE_SECONDS), attempt).await {
        Ok(Ok(connection)) => connection,
        Ok(Err(e)) => return Err(format!("cannot connect to the master target at {address}: {e}")),
        Err(_) => return Err(format!("the master target at {address} (udp) does not answer: is it running, is the port open?")),
    };
    let certificates = connection.peer_identity().and_then(|c| c.downcast::<Vec<rustls_pki_types::CertificateDer<'static>>>().ok());
    let identity = tls::peer_identity(certificates.as_deref().map(Vec::as_slice), Role::MasterTarget).map_err(|e| e.to_string())?;
    server.target.replace(Some(identity.name));
    Ok((endpoint, connection))
}

/// Runs every disk's stream until the connection ends; returns why it did.
async fn serve(server: &Rc<Server>, connection: &quinn::Connection) -> String {
    let mut tasks = JoinSet::new();
    for disk in server.disks.values() {
        tasks.spawn_local(stream::run(server.clone(), disk.clone(), connection.clone()));
    }
    // What is received only says that the other side sends, and it repeats old acknowledgements with that. That it hears us is
    // said by an acknowledgement of something new: a sample of the round-trip time, which moves its mean, in nanoseconds.
    let watch = async {
        let (mut last, mut heard_us) = ((Duration::ZERO, 0), clock::now());
        loop {
            let stats = connection.stats();
            metrics::disk_gauge(metrics::LINK_MTU, "", f64::from(stats.path.current_mtu));
            // One of another version may not take what is asked with: then any acknowledgement has to do.
            let now = (stats.path.rtt, if quic::probe(connection) { 0 } else { stats.frame_rx.acks });
            if std::mem::replace(&mut last, now) != now {
                heard_us = clock::now();
            }
            if clock::now().since(heard_us) >= Duration::from_secs(SILENCE_SECONDS) {
                return format!("it has acknowledged nothing for {SILENCE_SECONDS} s");
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    };
    tokio::select! {
        reason = connection.closed() => reason.to_string(),
        reason = watch => {
            connection.close(0u32.into(), reason.as_bytes());
            reason
        }
    }
    // Dropping the set ends the tasks; what they had under way is sent again on the next connection.
}
