// oauth4webapi, where every step is the caller's: each answer goes through the library's own check of it. The one thing
// allowed is http, since the service under test is on loopback.
import * as oauth from 'oauth4webapi';

import { visit } from './dialogue.mjs';

const HTTP = { [oauth.allowInsecureRequests]: true };
const AUTHENTICATION = {
  client_secret_basic: oauth.ClientSecretBasic,
  client_secret_post: oauth.ClientSecretPost,
  none: oauth.None,
};

async function discovered({ issuer, algorithm }) {
  const url = new URL(issuer);
  return oauth.processDiscoveryResponse(url, await oauth.discoveryRequest(url, { algorithm, ...HTTP }));
}

// Server, client, and how the client proves who it is.
async function parties(told) {
  const { client_secret: secret, ...client } = told.client;
  return [await discovered(told), client, AUTHENTICATION[client.token_endpoint_auth_method](secret)];
}

async function refusal(promise) {
  try {
    await promise;
  } catch (problem) {
    const [challenge] = Array.isArray(problem.cause) ? problem.cause : [];
    const error = problem.error ?? challenge?.parameters.error ?? null;
    return { kind: problem.constructor.name, error, status: problem.status ?? null };
  }
  throw new Error('it was not refused');
}

export async function metadata(told) {
  return discovered(told);
}

export async function clientCredentials(told) {
  const [server, client, authentication] = await parties(told);
  const answer = await oauth.clientCredentialsGrantRequest(server, client, authentication, told.request, HTTP);
  return oauth.processClientCredentialsResponse(server, client, answer);
}

export async function refusedClientCredentials(told) {
  return refusal(clientCredentials(told));
}

// An access token as a resource server would take it (RFC 9068), which looks for nothing but the issuer's key set.
export async function verify(told) {
  const request = new Request(told.audience, { headers: { authorization: `Bearer ${told.token}` } });
  return oauth.validateJwtAccessToken(await discovered(told), request, told.audience, HTTP);
}

export async function refusedVerify(told) {
  return refusal(verify(told));
}

export async function refresh(told) {
  const [server, client, authentication] = await parties(told);
  const options = { additionalParameters: told.request, ...HTTP };
  const answer = await oauth.refreshTokenGrantRequest(server, client, authentication, told.refresh_token, options);
  const tokens = await oauth.processRefreshTokenResponse(server, client, answer);
  if (tokens.id_token !== undefined) await oauth.validateApplicationLevelSignature(server, answer, HTTP);
  return tokens;
}

export async function refusedRefresh(told) {
  return refusal(refresh(told));
}

export async function introspect(told) {
  const [server, client, authentication] = await parties(told);
  const answer = await oauth.introspectionRequest(server, client, authentication, told.token, HTTP);
  return oauth.processIntrospectionResponse(server, client, answer);
}

export async function revoke(told) {
  const [server, client, authentication] = await parties(told);
  await oauth.processRevocationResponse(
    await oauth.revocationRequest(server, client, authentication, told.token, HTTP),
  );
  return {};
}

// The address to visit: with the request in it, or with the name of one that was pushed.
async function address(server, client, authentication, parameters, pushed) {
  const url = new URL(server.authorization_endpoint);
  if (!pushed) {
    url.search = new URLSearchParams({ client_id: client.client_id, ...parameters }).toString();
    return url;
  }
  const answer = await oauth.pushedAuthorizationRequest(server, client, authentication, parameters, HTTP);
  const { request_uri } = await oauth.processPushedAuthorizationResponse(server, client, answer);
  url.search = new URLSearchParams({ client_id: client.client_id, request_uri }).toString();
  return url;
}

// The way to the redirect URI and back; then the code for tokens. Each check of the library is made.
async function granted(told, isOpenid) {
  const [server, client, authentication] = await parties(told);
  const verifier = oauth.generateRandomCodeVerifier();
  const state = oauth.generateRandomState();
  const nonce = oauth.generateRandomNonce();
  const [redirect_uri] = client.redirect_uris;
  const parameters = {
    response_type: told.hybrid ? 'code id_token' : 'code',
    redirect_uri,
    code_challenge: await oauth.calculatePKCECodeChallenge(verifier),
    code_challenge_method: 'S256',
    state,
    ...(isOpenid ? { nonce } : {}),
    ...told.request,
  };
  const arrived = await visit(await address(server, client, authentication, parameters, told.pushed));
  const maxAge = told.request.max_age === undefined ? undefined : Number(told.request.max_age);
  const callback = told.hybrid
    ? await oauth.validateCodeIdTokenResponse(server, client, arrived, nonce, state, maxAge, HTTP)
    : oauth.validateAuthResponse(server, client, await parametersOf(arrived), state);
  const answer = await oauth.authorizationCodeGrantRequest(
    server,
    client,
    authentication,
    callback,
    redirect_uri,
    verifier,
    { additionalParameters: told.token_request, ...HTTP },
  );
  const expected = isOpenid ? { expectedNonce: nonce, maxAge, requireIdToken: true } : {};
  const tokens = await oauth.processAuthorizationCodeResponse(server, client, answer, expected);
  const claims = oauth.getValidatedIdTokenClaims(tokens);
  if (claims !== undefined) await oauth.validateApplicationLevelSignature(server, answer, HTTP);
  return { server, client, tokens, claims };
}

async function parametersOf(arrived) {
  return arrived instanceof URL ? arrived : new URLSearchParams(await arrived.text());
}

export async function signIn(told) {
  const { server, client, tokens, claims } = await granted(told, true);
  const answer = await oauth.userInfoRequest(server, client, tokens.access_token, HTTP);
  return { tokens, claims, userinfo: await oauth.processUserInfoResponse(server, client, claims.sub, answer) };
}

export async function refusedUserinfo(told) {
  const [server, client] = await parties(told);
  const answer = await oauth.userInfoRequest(server, client, told.token, HTTP);
  return refusal(oauth.processUserInfoResponse(server, client, told.subject, answer));
}

export async function refusedSignIn(told) {
  return refusal(granted(told, true));
}

export async function authorizeOnly(told) {
  return (await granted(told, false)).tokens;
}

// The library has no part in signing out: its users put the address together by themselves.
export async function signOut(told) {
  const [server, client] = await parties(told);
  const state = oauth.generateRandomState();
  const [post_logout_redirect_uri] = client.post_logout_redirect_uris;
  const url = new URL(server.end_session_endpoint);
  url.search = new URLSearchParams({ id_token_hint: told.id_token, post_logout_redirect_uri, state }).toString();
  const arrived = await visit(url);
  if (arrived.searchParams.get('state') !== state) throw new Error(`the state did not come back: ${arrived}`);
  return { arrived: arrived.origin + arrived.pathname };
}
