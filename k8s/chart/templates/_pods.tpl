{{- /* Parts of pods. */ -}}
{{- define "outcrop.podSecurity" -}}
runAsNonRoot: true
{{- with .Values.securityContext }}
{{ toYaml . }}
{{- end }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "outcrop.containerSecurity" -}}
allowPrivilegeEscalation: false
capabilities: {drop: [ALL]}
{{- end -}}

{{- /* What every pod's spec begins with. enableServiceLinks: a Service called outcrop-* would set OUTCROP_* variables,
       which are settings. */ -}}
{{- define "outcrop.podCommon" -}}
enableServiceLinks: false
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
{{- range . }}
  - name: {{ . }}
{{- end }}
{{- end }}
{{- with .Values.priorityClass.name }}
priorityClassName: {{ . }}
{{- end }}
securityContext:
  {{- include "outcrop.podSecurity" . | nindent 2 }}
{{- end -}}

{{- /* (dict "cpu" "cpuLimit" "memory", "gpus" N): memory and GPUs have one number, CPUs may have two. */ -}}
{{- define "outcrop.resources" -}}
requests:
  cpu: {{ .cpu | quote }}
  memory: {{ .memory }}
{{- with .gpus }}
  nvidia.com/gpu: {{ . | quote }}
{{- end }}
limits:
  cpu: {{ .cpuLimit | default .cpu | quote }}
  memory: {{ .memory }}
{{- with .gpus }}
  nvidia.com/gpu: {{ . | quote }}
{{- end }}
{{- end -}}

{{- /* Of every Ray container. The API key is read where Serve builds the application, which may be on any node. It is not
       optional: where the Secret is missing or misspelt, no pod may start and serve everybody. */ -}}
{{- define "outcrop.env" -}}
{{ with .Values.apiKey.secretName }}
- name: OUTCROP_API_KEY
  valueFrom: {secretKeyRef: {name: {{ . }}, key: {{ $.Values.apiKey.key }}}}
{{ end -}}
- {name: RAY_max_direct_call_object_size, value: "4194304"} # token batches travel inside the RPC
- {name: RAY_worker_niceness, value: "0"}
- {name: RAY_USAGE_STATS_ENABLED, value: "0"}
{{ if .Values.haProxy -}}
- {name: RAY_SERVE_ENABLE_HA_PROXY, value: "1"}
{{ end -}}
{{- end -}}

{{- define "outcrop.modelMounts" -}}
{{- if .Values.models.volume.enabled }}
- {name: models, mountPath: /models{{ if eq (.Values.models.fetch.by | default "") "job" }}, readOnly: true{{ end }}}
{{- end }}
{{- end -}}

{{- define "outcrop.modelVolume" -}}
{{- $volume := .Values.models.volume -}}
- name: models
{{- if $volume.hostPath }}
  hostPath: {path: {{ $volume.hostPath }}, type: Directory}
{{- else }}
  persistentVolumeClaim: {claimName: {{ $volume.existingClaim | default (printf "%s-models" (include "outcrop.fullname" .)) }}}
{{- end }}
{{- end -}}

{{- /* (dict "root" $ "command" LIST "readOnly" BOOL "gpus" N): the container that downloads, or that waits for who does.
       Of the same image as its pod: a node pulls one. */ -}}
{{- define "outcrop.fetchContainer" -}}
image: {{ include "outcrop.image" . }}
imagePullPolicy: {{ .root.Values.image.pullPolicy }}
command: {{ .command | toJson }}
{{- if not .readOnly }}
env:
  {{- include "outcrop.hubToken" .root | nindent 2 }}
{{- end }}
securityContext:
  {{- include "outcrop.containerSecurity" .root | nindent 2 }}
resources:
  {{- if .readOnly }}
  requests: {cpu: 100m, memory: 256Mi}
  limits: {cpu: 500m, memory: 256Mi}
  {{- else }}
  requests: {cpu: "1", memory: 2Gi}
  limits: {cpu: "2", memory: 2Gi}
  {{- end }}
volumeMounts:
  - {name: models, mountPath: /models{{ if .readOnly }}, readOnly: true{{ end }}}
{{- end -}}

{{- define "outcrop.hubToken" -}}
- name: HF_TOKEN
  valueFrom: {secretKeyRef: {name: {{ .Values.models.fetch.tokenSecret.name }}, key: {{ .Values.models.fetch.tokenSecret.key }}, optional: true}}
{{- end -}}

{{- define "outcrop.fetchCommand" -}}
{{- $fetch := .Values.models.fetch -}}
{{- list "outcrop-fetch-model" (required "models.fetch.hubId is missing" $fetch.hubId) $fetch.revision .Values.settings.model | toJson -}}
{{- end -}}

{{- /* The pod of the Job that downloads. */ -}}
{{- define "outcrop.fetchTemplate" -}}
metadata:
  labels:
    {{- include "outcrop.podLabels" (dict "root" . "component" "fetch-model") | nindent 4 }}
spec:
  {{- include "outcrop.podCommon" . | nindent 2 }}
  restartPolicy: OnFailure
  automountServiceAccountToken: false
  {{- with .Values.serviceAccount.workers }}
  serviceAccountName: {{ . }}
  {{- end }}
  containers:
    - name: fetch-model
      {{- include "outcrop.fetchContainer" (dict "root" . "gpus" 0 "readOnly" false "command" (include "outcrop.fetchCommand" . | fromJsonArray)) | nindent 6 }}
  volumes:
    {{- include "outcrop.modelVolume" . | nindent 4 }}
{{- end }}
